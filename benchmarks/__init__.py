"""How fast the gateway is, and against what it is measured and tested.

`benchmarks.provider` is the stand-in provider that tests, the sandbox and the
benchmarks talk to; `benchmarks.load` is the client that loads a gateway;
`python -m benchmarks <scenario>` runs both around a gateway and reports.
"""
