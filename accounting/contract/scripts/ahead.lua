-- ahead: how many requests workers may still admit from what they leased ahead.
--
-- KEYS[1] {sNN}:ws:<workspace>
-- reply   requests of the workspace leased ahead, not past their deadline
--
-- Invariant: reads only. A lease past its deadline counts for nothing, since the worker's own
-- right to it ended earlier, by its own clock; but it stays held: what a worker has not told
-- yet may be behind requests in flight. It comes back when the worker speaks, or is retired.

local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local fields = redis.call('HGETALL', KEYS[1])
local alive = 0
for i = 1, #fields, 2 do
  if string.sub(fields[i], 1, 2) == 'l:' then
    local l = cmsgpack.unpack(fields[i + 1])
    if (l[4] or 0) > 0 and l[7] >= now then alive = alive + l[4] end
  end
end
return alive
