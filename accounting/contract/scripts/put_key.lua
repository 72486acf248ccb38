-- put_key: set what limits a key; its counters are left alone.
--
-- KEYS[1] {sNN}:ws:<workspace>
-- ARGV[1] key id  ARGV[2] MessagePack KeyRules {version, state, expires_at_us, rpm, tpm,
--         tokens_per_day, concurrency, cost_cap_ucr}
-- reply   1 when written, 0 when a newer version is here already
--
-- Invariant: versions only rise, so a late writer never brings back an older state.

local rules = cmsgpack.unpack(ARGV[2])
if type(rules) ~= 'table' or #rules ~= 8 then error('put_key: expected eight figures') end
for i = 1, 8 do
  local x = rules[i]
  if type(x) ~= 'number' or x ~= math.floor(x) or x > 9000000000000000
      or x < (i == 8 and -1 or 0) then
    error('put_key: expected whole numbers')
  end
end
local field = 'k:' .. ARGV[1]
local packed = redis.call('HGET', KEYS[1], field)
if packed and cmsgpack.unpack(packed)[1] > rules[1] then return 0 end
redis.call('HSET', KEYS[1], field, cmsgpack.pack(rules))
return 1
