-- depart: a worker boot is gone, and everything it held has been given back.
--
-- KEYS[1] {workers}:heard   KEYS[2] {workers}:fenced
-- ARGV[1] boot   ARGV[2] ms to keep its fence
-- reply   1
--
-- Invariant: its fence is kept until what it sent can no longer arrive.

local keep = tonumber(ARGV[2])
if not keep or keep <= 0 then error('depart: expected ms') end
local time = redis.call('TIME')
redis.call('ZADD', KEYS[2], 'GT', time[1] * 1000 + keep, ARGV[1])
redis.call('ZREM', KEYS[1], ARGV[1])
return 1
