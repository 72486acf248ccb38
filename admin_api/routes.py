"""Every route of the admin API, once: who may call it, what it takes, what it answers.

A route is for the operator or for a client's key; only the paths in `PUBLIC` answer without
authentication. The serving (`app.py`) and the description (`openapi.py`) both come from here.
"""

from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Any

from msgspec import Struct

from accounting import keys
from admin_api.account import keys as account_keys
from admin_api.account import wallet
from admin_api.call import Call
from admin_api.operator import corrections, grants, workspaces
from admin_api.operator import keys as operator_keys
from admin_api.payloads import Body

HEALTHZ, OPENAPI = "/healthz", "/v1/openapi.json"
PUBLIC = (HEALTHZ, OPENAPI)


class Caller(Enum):
    OPERATOR = "operator"
    KEY = "key"


class Route(Struct, frozen=True, kw_only=True):
    """`scope`: what a key needs. `makes`: the prefix of ids it makes. `kept`: idempotency keys
    of money are kept for good. A route that is no GET is a mutation."""

    operation: str
    method: str
    path: str
    summary: str
    caller: Caller
    handle: Callable[[Call[Any]], Awaitable[Any]]
    answer: type[Struct]
    status: int = 200
    body: type[Body] = Body
    scope: str = keys.ACCOUNT
    makes: str = "op"
    kept: bool = False

    @property
    def mutates(self) -> bool:
        return self.method != "GET"

    @property
    def template(self) -> str:
        return f"{self.method} {self.path}"


_WORKSPACE = "/v1/admin/workspaces/{id}"

ROUTES = (
    Route(
        operation="admin.workspaces.create",
        method="POST",
        path="/v1/admin/workspaces",
        summary="Open a workspace.",
        caller=Caller.OPERATOR,
        handle=workspaces.create,
        body=workspaces.NewWorkspace,
        answer=workspaces.WorkspaceSummary,
        status=201,
        makes="ws",
    ),
    Route(
        operation="admin.workspaces.get",
        method="GET",
        path=_WORKSPACE,
        summary="A workspace and its wallet.",
        caller=Caller.OPERATOR,
        handle=workspaces.get,
        answer=workspaces.WorkspaceDetails,
    ),
    Route(
        operation="admin.workspaces.suspend",
        method="POST",
        path=f"{_WORKSPACE}/suspend",
        summary="Refuse all requests of a workspace from now on; its balance is kept.",
        caller=Caller.OPERATOR,
        handle=workspaces.suspend,
        answer=workspaces.WorkspaceSummary,
    ),
    Route(
        operation="admin.workspaces.resume",
        method="POST",
        path=f"{_WORKSPACE}/resume",
        summary="Serve a suspended workspace again.",
        caller=Caller.OPERATOR,
        handle=workspaces.resume,
        answer=workspaces.WorkspaceSummary,
    ),
    Route(
        operation="admin.grants.create",
        method="POST",
        path=f"{_WORKSPACE}/grants",
        summary="Give credits to a workspace.",
        caller=Caller.OPERATOR,
        handle=grants.create,
        body=grants.NewGrant,
        answer=grants.GrantSummary,
        status=201,
        makes="op",
        kept=True,
    ),
    Route(
        operation="admin.grants.list",
        method="GET",
        path=f"{_WORKSPACE}/grants",
        summary="A workspace's grants and what became of them, the newest first.",
        caller=Caller.OPERATOR,
        handle=grants.list_all,
        answer=grants.GrantList,
    ),
    Route(
        operation="admin.grants.refund",
        method="POST",
        path="/v1/admin/grants/{id}/refund",
        summary="Take unused credits of a topup back, all that is asked or nothing.",
        caller=Caller.OPERATOR,
        handle=corrections.refund,
        body=corrections.NewRefund,
        answer=corrections.WithdrawalSummary,
        kept=True,
    ),
    Route(
        operation="admin.grants.claw_back",
        method="POST",
        path="/v1/admin/grants/{id}/claw-back",
        summary="Take back what is left of a grant, but for what open requests hold.",
        caller=Caller.OPERATOR,
        handle=corrections.claw_back,
        body=corrections.NewClawback,
        answer=corrections.WithdrawalSummary,
        kept=True,
    ),
    Route(
        operation="admin.usage.reverse",
        method="POST",
        path="/v1/admin/usage/{id}/reverse",
        summary="Charge a recorded request less, or nothing; the grants that paid get it back.",
        caller=Caller.OPERATOR,
        handle=corrections.reverse,
        body=corrections.NewReversal,
        answer=corrections.ReversalSummary,
        kept=True,
    ),
    Route(
        operation="admin.keys.create",
        method="POST",
        path=f"{_WORKSPACE}/keys",
        summary="Make a key of a workspace; its secret is shown once.",
        caller=Caller.OPERATOR,
        handle=operator_keys.create,
        body=operator_keys.NewKey,
        answer=operator_keys.MadeKey,
        status=201,
        makes="key",
    ),
    Route(
        operation="account.balance",
        method="GET",
        path="/v1/account/balance",
        summary="The wallet's balance and trial status.",
        caller=Caller.KEY,
        handle=wallet.balance,
        answer=wallet.WalletBalance,
    ),
    Route(
        operation="account.wallet.restore",
        method="POST",
        path="/v1/account/wallet/restore",
        summary="Get forfeited credits back within the time of grace.",
        caller=Caller.KEY,
        handle=wallet.restore,
        answer=wallet.WalletRestoreResult,
        kept=True,
    ),
    Route(
        operation="account.whoami",
        method="GET",
        path="/v1/account/whoami",
        summary="The account: id, type, status, tier, balance.",
        caller=Caller.KEY,
        handle=wallet.whoami,
        answer=wallet.AccountSummary,
    ),
    Route(
        operation="account.keys.list",
        method="GET",
        path="/v1/account/keys/list",
        summary="The account's keys, the newest thousand, and their status.",
        caller=Caller.KEY,
        handle=account_keys.list_all,
        answer=account_keys.KeyList,
    ),
    Route(
        operation="account.keys.revoke",
        method="DELETE",
        path="/v1/account/keys/revoke/{id}",
        summary="Revoke a key; the very next request with it is refused.",
        caller=Caller.KEY,
        handle=account_keys.revoke,
        answer=account_keys.Revoked,
    ),
)
