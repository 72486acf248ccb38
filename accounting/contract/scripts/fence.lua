-- fence: from here on a worker boot can neither lease nor settle in this shard.
--
-- KEYS[1] {sNN}:boots   KEYS[2] {sNN}:leases:<boot>
-- ARGV[1] boot
-- reply   <workspace>|<key> of each lease it still has here
--
-- Invariant: a command of the boot that was long on its way finds the fence and does nothing.

redis.call('HSET', KEYS[1], ARGV[1], 'fenced')
redis.call('SREM', KEYS[2], 'fenced')
local leased = redis.call('SMEMBERS', KEYS[2])
redis.call('SADD', KEYS[2], 'fenced')
return leased
