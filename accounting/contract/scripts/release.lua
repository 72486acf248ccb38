-- release: give back all that one worker boot still leases under one key.
--
-- KEYS[1] {sNN}:ws:<workspace>   KEYS[2] {sNN}:leases:<boot>
-- ARGV[1] boot  ARGV[2] key id  ARGV[3] workspace id
-- reply   figures (signed 64-bit, little-endian): credits, tokens, slots given back
--
-- Invariant: called only when no exchange of that boot is open under the key, so nothing
-- that could still be charged loses its hold. Running it twice gives nothing back twice.

local boot, key_id = ARGV[1], ARGV[2]
local counters_field, lease_field = 'c:' .. key_id, 'l:' .. boot .. ':' .. key_id
local found = redis.call('HMGET', KEYS[1], 'w', counters_field, lease_field)
redis.call('SREM', KEYS[2], ARGV[3] .. '|' .. key_id)
if not found[1] or not found[3] then return struct.pack('<i8i8i8', 0, 0, 0) end
local l = cmsgpack.unpack(found[3])
redis.call('HDEL', KEYS[1], lease_field)
-- Most cold keys come here with nothing left: then there is nothing more to write.
if l[1] ~= 0 or l[2] ~= 0 or l[3] ~= 0 or (l[4] or 0) ~= 0 or (l[5] or 0) ~= 0 then
  local w = cmsgpack.unpack(found[1])
  w[2], w[5] = w[2] - l[1], (w[5] or 0) - (l[5] or 0)
  if found[2] then
    local c = cmsgpack.unpack(found[2])
    c[6], c[7], c[8] = c[6] - l[3], c[7] - l[1], c[8] - l[2]
    c[10] = (c[10] or 0) - (l[4] or 0)
    redis.call('HSET', KEYS[1], 'w', cmsgpack.pack(w), counters_field, cmsgpack.pack(c))
  else
    redis.call('HSET', KEYS[1], 'w', cmsgpack.pack(w))
  end
end
return struct.pack('<i8i8i8', l[1], l[2], l[3])
