-- beat: a worker boot says that it lives.
--
-- KEYS[1] {workers}:heard   KEYS[2] {workers}:fenced   KEYS[3] {workers}:clock
-- ARGV[1] boot
-- reply   1; 0 when the boot was retired: it may lease and settle nothing any more
--
-- Invariant: once fenced, a boot is not heard again.

if redis.call('ZSCORE', KEYS[2], ARGV[1]) then return 0 end
redis.call('ZADD', KEYS[1], redis.call('HGET', KEYS[3], 'ms') or 0, ARGV[1])
return 1
