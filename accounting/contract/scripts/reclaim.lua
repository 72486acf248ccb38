-- reclaim: take back what workers leased ahead and may no longer use.
--
-- KEYS[1] {sNN}:ws:<workspace>
-- reply   requests of the workspace still leased ahead, by workers that may still use them
--
-- Invariant: only the unused part of a lease past its deadline is taken; the worker's own
-- right to it ended earlier, by its own clock. What is behind requests in flight stays. What
-- was used and settled since the worker's last call is in the unused part still, but no longer
-- in the lease, and is not taken twice.

local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local fields = redis.call('HGETALL', KEYS[1])
local w, counters, leases, alive = nil, {}, {}, 0
for i = 1, #fields, 2 do
  local name = fields[i]
  local kind = string.sub(name, 1, 2)
  if name == 'w' then
    w = cmsgpack.unpack(fields[i + 1])
  elseif kind == 'c:' then
    counters[string.sub(name, 3)] = cmsgpack.unpack(fields[i + 1])
  elseif kind == 'l:' then
    local l = cmsgpack.unpack(fields[i + 1])
    if (l[4] or 0) > 0 then
      if l[7] < now then leases[name] = l else alive = alive + l[4] end
    end
  end
end
if not w or next(leases) == nil then return alive end

for name, l in pairs(leases) do
  local key_id = string.match(name, ':([^:]*)$')
  local c = counters[key_id]
  local credits, tokens = math.min(l[5], l[1]), math.min(l[6], l[2])
  local slots = math.min(l[4], l[3])
  w[2], w[5] = w[2] - credits, w[5] - l[5]
  if c then
    c[6], c[7], c[8], c[10] = c[6] - slots, c[7] - credits, c[8] - tokens, c[10] - l[4]
    redis.call('HSET', KEYS[1], 'c:' .. key_id, cmsgpack.pack(c))
  end
  l[1], l[2], l[3] = l[1] - credits, l[2] - tokens, l[3] - slots
  l[4], l[5], l[6] = 0, 0, 0
  redis.call('HSET', KEYS[1], name, cmsgpack.pack(l))
end
redis.call('HSET', KEYS[1], 'w', cmsgpack.pack(w))
return alive
