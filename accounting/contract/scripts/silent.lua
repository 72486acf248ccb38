-- silent: move the clock by which silence is measured; fence the boots silent for too long.
--
-- KEYS[1] {workers}:heard   KEYS[2] {workers}:fenced   KEYS[3] {workers}:clock
-- ARGV[1] ms of silence after which a boot is given up   ARGV[2] ms to keep its fence
-- reply   boots that are fenced and still to be retired, the longest silent first
--
-- Invariant: the clock follows Redis's, but in steps of five seconds at most. So it stands
-- still while Redis or accounting does, and nobody seems silent who could not be heard.

local STEP = 5000
local AT_ONCE = 100
local silence, keep = tonumber(ARGV[1]), tonumber(ARGV[2])
if not silence or not keep or silence <= 0 or keep <= 0 then error('silent: expected ms') end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local clock = redis.call('HMGET', KEYS[3], 'at', 'ms')
local passed = now - tonumber(clock[1] or now)
local ms = tonumber(clock[2] or 0) + math.max(0, math.min(passed, STEP))
redis.call('HSET', KEYS[3], 'at', now, 'ms', ms)
local found = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ms - silence, 'LIMIT', 0, AT_ONCE)
for _, boot in ipairs(found) do redis.call('ZADD', KEYS[2], 'NX', now + keep, boot) end
return found
