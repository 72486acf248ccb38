-- settle: turn holds into charges, once, and put the batch's usage events on the stream.
--
-- KEYS[1] {sNN}:usage   KEYS[2] {sNN}:boots   KEYS[3..] {sNN}:ws:<workspace>
-- ARGV[1] boot  ARGV[2] batch number of this boot and shard, from 1, rising
-- ARGV[3] the batch's usage events, opaque
-- ARGV[4], ARGV[5] and so on, a pair per workspace and key:
--         key id; figures (unsigned 64-bit, little-endian): workspace, counted from 1 at
--         KEYS[3]; credits released, charge, tokens released, tokens used, slots released;
--         then admitted_at_us of each void
-- reply   the stream id, or '' when this batch was settled before;
--         error FENCED: the boot was retired, see fence.lua
--
-- Invariant: each (boot, batch number) takes effect once; charge <= credits released; the
-- charge leaves the balance in the same step as its event enters the stream. Everything is
-- checked before the first write, and the first write runs even at maxmemory.

local MINUTE = 60000000
local DAY = 86400000000
local MAX = 9000000000000000
local ROW = '<I8I8I8I8I8I8'
local VOIDS = 49  -- the byte of a row's figures at which they begin

local call, ceil, max, min = redis.call, math.ceil, math.max, math.min
local unpack_figures, unpack_record, pack_record = struct.unpack, cmsgpack.unpack, cmsgpack.pack

local boot, events = ARGV[1], ARGV[3]
if not string.match(ARGV[2], '^%d+$') then error('settle: expected a batch number') end
local number = tonumber(ARGV[2])
if number < 1 or number > MAX then error('settle: batches count from 1') end
if #events == 0 then error('settle: no events') end
if #ARGV < 5 or #ARGV % 2 == 0 then error('settle: expected pairs') end
for i = 5, #ARGV, 2 do
  local figures = ARGV[i]
  local workspace, released, charge, tokens, used, slots = unpack_figures(ROW, figures)
  if #figures % 8 ~= 0 or max(released, charge, tokens, used, slots) > MAX then
    error('settle: expected a whole number')
  end
  if workspace < 1 or not KEYS[2 + workspace] then error('settle: unknown workspace') end
  if charge > released then error('settle: charge above hold') end
  for at = VOIDS, #figures, 8 do
    if unpack_figures('<I8', figures, at) > MAX then error('settle: expected a whole number') end
  end
end

local last = call('HGET', KEYS[2], boot)
if last == 'fenced' then return redis.error_reply('FENCED this boot was retired') end
if last and tonumber(last) >= number then return '' end

local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local today = math.floor(now / DAY)

-- Once anything is deleted, Redis lets a script write on though memory is full.
local noted = redis.pcall('HSET', KEYS[2], boot, ARGV[2])
if type(noted) == 'table' then
  call('HDEL', KEYS[2], boot)
  call('HSET', KEYS[2], boot, ARGV[2])
end

for i = 5, #ARGV, 2 do
  local key_id, figures = ARGV[i - 1], ARGV[i]
  local workspace, released, charge, tokens, used, slots = unpack_figures(ROW, figures)
  local hash = KEYS[2 + workspace]
  local counters_field, lease_field = 'c:' .. key_id, 'l:' .. boot .. ':' .. key_id
  local found = call('HMGET', hash, 'w', 'k:' .. key_id, counters_field, lease_field)
  -- An unknown workspace has no wallet to change; its events are kept all the same.
  if found[1] then
    local w = unpack_record(found[1])
    local k = found[2] and unpack_record(found[2]) or {0, 0, 0, 0, 0, 0, 0, -1}
    local c = found[3] and unpack_record(found[3]) or {0, 0, 0, 0, 0, 0, 0, 0, 0}
    local l = found[4] and unpack_record(found[4]) or {0, 0, 0}
    released, tokens, slots = min(released, l[1]), min(tokens, l[2]), min(slots, l[3])
    l[1], l[2], l[3] = l[1] - released, l[2] - tokens, l[3] - slots
    w[1], w[2] = w[1] - charge, w[2] - released
    c[6], c[7], c[8], c[9] = c[6] - slots, c[7] - released, c[8] - tokens, c[9] + charge
    -- A bucket is never more than full, though tokens were asked for under a wider limit.
    if k[5] > 0 and used > 0 then
      c[3] = min(now + MINUTE, max(c[3], now) + ceil(used * MINUTE / k[5]))
    end
    if c[4] ~= today then c[4], c[5] = today, 0 end
    c[5] = c[5] + used
    -- A void gives its request back, if the bucket has not been full since it was taken and
    -- it is younger than a full bucket: an older one has drained away like any other.
    if k[4] > 0 and c[1] > now then
      local gap = ceil(MINUTE / k[4])
      for at = VOIDS, #figures, 8 do
        local admitted_at = unpack_figures('<I8', figures, at)
        if admitted_at >= c[2] and admitted_at > now - k[4] * gap then c[1] = c[1] - gap end
      end
    end
    if found[4] then
      call('HSET', hash, 'w', pack_record(w), counters_field, pack_record(c),
        lease_field, pack_record(l))
    else  -- released before it was settled
      call('HSET', hash, 'w', pack_record(w), counters_field, pack_record(c))
    end
  end
end
return call('XADD', KEYS[1], '*', 'b', boot, 'n', ARGV[2], 'e', events)
