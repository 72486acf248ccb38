"""Credits set aside in Redis before the ledger takes them, so that nobody spends them meanwhile.

A reservation is a lease of a worker boot called `expiry`: held like any lease, and in no key's
figures. It ends in the step that applies the delta which takes its credits (`deltas.py`), or
when it is set to nothing.
"""

from typing import Any

from redis.asyncio import Redis

from accounting.contract import keyspace

RESERVE = "expiry"  # stands for a worker boot in the lease that reserves credits

_RESERVE = """
-- reserve: set a reservation to so much, or to what is free if that is less.
-- KEYS[1] {sNN}:ws:<workspace>  ARGV[1] field of the reservation  ARGV[2] µcr wanted
-- reply   µcr reserved now, or -1 when the wallet is unknown
-- Invariant: held <= balance before implies held <= balance after.
local found = redis.call('HMGET', KEYS[1], 'w', ARGV[1])
local wanted = tonumber(ARGV[2])
if not wanted or wanted < 0 or wanted ~= math.floor(wanted) then error('reserve: µcr?') end
if not found[1] then return -1 end
local w = cmsgpack.unpack(found[1])
local l = found[2] and cmsgpack.unpack(found[2]) or {0, 0, 0}
local taken = math.max(0, math.min(wanted, w[1] - w[2] + l[1]))
w[2] = w[2] - l[1] + taken
redis.call('HSET', KEYS[1], 'w', cmsgpack.pack(w), ARGV[1], cmsgpack.pack({taken, 0, 0}))
if taken == 0 then redis.call('HDEL', KEYS[1], ARGV[1]) end
return taken
"""


async def reserve(redis: Redis, workspace_id: str, name: str, wanted_ucr: int) -> int:
    """Make the reservation `name` (an id) as large as wanted or as free credits allow.

    Its µcr now; -1 when Redis does not know the wallet. Raises redis.exceptions.RedisError.
    """
    key = keyspace.workspace_key(workspace_id)
    reserved: Any = await redis.eval(_RESERVE, 1, key, f"l:{RESERVE}:{name}", wanted_ucr)
    return int(reserved)
