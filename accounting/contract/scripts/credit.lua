-- credit: apply one ledger delta to a wallet, exactly once.
--
-- KEYS[1] {sNN}:ws:<workspace>
-- ARGV[1] delta id of the workspace, from 1, without gaps  ARGV[2] amount in µcr, signed
-- ARGV[3] key id  ARGV[4] µcr, signed, by which that key has spent more; both may be left out
-- reply   {1, balance} applied; {0, balance} applied before; {-1, last} a delta is missing;
--         {-2, 0} workspace unknown here
--
-- Invariant: deltas apply in order and once, to balance and spend in one step; a balance stays
-- within what a double holds.

local MAX = 9000000000000000
-- Digits only: beyond 2^52 a double has no room for a fraction, so it could not be told.
if not string.match(ARGV[1], '^%d+$') or not string.match(ARGV[2], '^-?%d+$')
    or not string.match(ARGV[4] or '0', '^-?%d+$') then
  error('credit: expected whole numbers')
end
local delta, amount, spent = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[4] or '0')
if delta < 1 or delta > MAX or math.abs(amount) > MAX or math.abs(spent) > MAX then
  error('credit: out of range')
end
if spent ~= 0 and ARGV[3] == '' then error('credit: whose spend?') end
local packed = redis.call('HGET', KEYS[1], 'w')
if not packed then return {-2, 0} end
local w = cmsgpack.unpack(packed)
if delta <= w[4] then return {0, w[1]} end
if delta ~= w[4] + 1 then return {-1, w[4]} end
if math.abs(w[1] + amount) > MAX then error('credit: balance out of range') end
w[1], w[4] = w[1] + amount, delta
local wallet = cmsgpack.pack(w)
if spent == 0 then
  redis.call('HSET', KEYS[1], 'w', wallet)
else
  local found = redis.call('HGET', KEYS[1], 'c:' .. ARGV[3])
  local c = found and cmsgpack.unpack(found) or {0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
  c[9] = c[9] + spent
  redis.call('HSET', KEYS[1], 'w', wallet, 'c:' .. ARGV[3], cmsgpack.pack(c))
end
return {1, w[1]}
