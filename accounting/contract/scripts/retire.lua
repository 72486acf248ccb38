-- retire: give back all that a fenced worker boot still leases under one key.
--
-- KEYS[1] {sNN}:ws:<workspace>   KEYS[2] {sNN}:leases:<boot>
-- ARGV[1] boot  ARGV[2] key id  ARGV[3] workspace id
-- ARGV[4] 1: what it had leased ahead counts as requests made, for it may have admitted them
--         without having told; 0: that was long ago
-- reply   {credits, tokens, slots} given back
--
-- Invariant: running it twice gives nothing back and counts nothing twice.

local MINUTE = 60000000
local boot, key_id = ARGV[1], ARGV[2]
local lease_field = 'l:' .. boot .. ':' .. key_id
local found = redis.call('HMGET', KEYS[1], 'w', 'c:' .. key_id, lease_field, 'k:' .. key_id)
redis.call('SREM', KEYS[2], ARGV[3] .. '|' .. key_id)
if not found[1] or not found[3] then return {0, 0, 0} end
local w, l = cmsgpack.unpack(found[1]), cmsgpack.unpack(found[3])
local ahead = l[4] or 0
redis.call('HDEL', KEYS[1], lease_field)
w[2], w[5] = w[2] - l[1], (w[5] or 0) - (l[5] or 0)
redis.call('HSET', KEYS[1], 'w', cmsgpack.pack(w))
if found[2] then
  local c = cmsgpack.unpack(found[2])
  c[6], c[7], c[8] = c[6] - l[3], c[7] - l[1], c[8] - l[2]
  c[10] = (c[10] or 0) - ahead
  local rpm = found[4] and cmsgpack.unpack(found[4])[4] or 0
  if ARGV[4] == '1' and ahead > 0 and rpm > 0 then
    local time = redis.call('TIME')
    local now = time[1] * 1000000 + time[2]
    if c[1] <= now then c[1], c[2] = now, now end
    c[1] = math.min(now + MINUTE, c[1] + ahead * math.ceil(MINUTE / rpm))
  end
  redis.call('HSET', KEYS[1], 'c:' .. key_id, cmsgpack.pack(c))
end
return {l[1], l[2], l[3]}
