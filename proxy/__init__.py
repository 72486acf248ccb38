"""The hot path: one request from its first byte to its settle, in the order of the files.

A client's bytes arrive at `front_door` [1]; `request_reader` turns them into requests and
tells which lane they take. Most paths go to `aiohttp_lane`; chat completions go to an
`exchange`, which tells the rest of the story:

[2] `request_head`   what is asked: model, stream, output ceiling; the worst it can cost
[3] `keys`           whom the secret stands for
[4] `routing`, `cooldown`   the model's targets, in order, less those that keep failing
[5] `leases`, `key_lease`, `admission`, `recalls`   every limit at once: a hold, or a typed refusal
[6] `upstream`, `upstream_connection`, `upstream_tls`  a pooled connection to the provider
[7] `relay`, `usage_scanner`, `provider_usage`, `sse`  bytes pass; usage is read and taken out
[8] `bill`, `settlement`, `journal`  the hold becomes a charge, exactly once, whatever happened
[9] `answer`, `replies`  heads, final chunks and errors as the client's dialect expects them

`worker` builds and stops all this, `drain` sees its connections to their end; `supervisor` has
a `seat` per core and rolls their workers, processes of its `fleet`; `replay` settles what a
killed worker left in its journal; `standing` looks after gate and heartbeat, and tells a Redis
that lost something (`tail`).
"""
