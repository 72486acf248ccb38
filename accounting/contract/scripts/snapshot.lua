-- snapshot: everything of one workspace and its stream's position, at one instant.
--
-- KEYS[1] {sNN}:ws:<workspace>   KEYS[2] {sNN}:usage
-- reply   {last generated stream id, field, value, field, value, ...}
--
-- Invariant: reads only; figures and position belong to the same instant, so a balance can
-- be compared with a ledger whose own position in the stream is known.

local last = '0-0'
if redis.call('EXISTS', KEYS[2]) == 1 then
  local info = redis.call('XINFO', 'STREAM', KEYS[2])
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then last = info[i + 1] end
  end
end
local reply = redis.call('HGETALL', KEYS[1])
table.insert(reply, 1, last)
return reply
