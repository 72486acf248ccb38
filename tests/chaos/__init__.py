"""Chaos: the whole product under mixed load while its parts are killed, stopped and robbed.

    python -m tests.chaos MINUTES [SEED]     make chaos MINUTES=… SEED=…

`site` runs the product's real processes on stores of its own; `people` are its workspaces and
keys, and what operators do to them meanwhile; `load` asks, hangs up, reads slowly and notes
what it was told; `faults` is the seeded schedule and `injector` carries it out; `books` waits
until everything has come to rest and compares what clients were told with the ledger. `run`
is one run of all that, and `report` what is said of it.
"""
