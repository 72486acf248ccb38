"""The account and operator API: a thin door to accounting.

The walk of a request: `app.py` takes it, `routes.py` says which route it is and who may call
it, `authentication.py` finds out who calls, `payloads.py` turns the body into a type,
`idempotency.py` makes sure it is carried out once, a handler in `operator/` or `account/`
asks accounting, and `problems.py` words what went wrong. `openapi.py` describes the whole
from the same table of routes. Rules, SQL and scripts live in accounting, none of them here.
"""
