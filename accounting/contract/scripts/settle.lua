-- settle: turn holds into charges, once, and put the batch's usage events on the stream.
--
-- KEYS[1] {sNN}:usage   KEYS[2] {sNN}:boots   KEYS[3..] {sNN}:ws:<workspace>
-- ARGV[1] boot  ARGV[2] batch number of this boot and shard, from 1, rising
-- ARGV[3] MessagePack rows: {workspace_index, key id, credits_released, charge,
--         tokens_released, tokens_used, slots_released, {admitted_at_us of each void}}
--         one row per workspace and key; workspace_index counts from 1 at KEYS[3]
-- ARGV[4] the batch's usage events, opaque
-- reply   the stream id, or '' when this batch was settled before;
--         error FENCED: the boot was retired, see fence.lua
--
-- Invariant: each (boot, batch number) takes effect once; charge <= credits_released; the
-- charge leaves the balance in the same step as its event enters the stream. Everything is
-- checked before the first write, and the first write runs even at maxmemory.

local MINUTE = 60000000
local DAY = 86400000000
local MAX = 9000000000000000

local function whole(x)
  if type(x) ~= 'number' or x < 0 or x > MAX or x ~= math.floor(x) then
    error('settle: expected a whole number')
  end
  return x
end

-- A list without holes, so that nothing in it is passed over.
local function list(x)
  local count = 0
  for _ in pairs(x) do count = count + 1 end
  if count ~= #x then error('settle: expected a list') end
  return x
end

local boot = ARGV[1]
if not string.match(ARGV[2], '^%d+$') then error('settle: expected a batch number') end
local number = whole(tonumber(ARGV[2]))
if number < 1 then error('settle: batches count from 1') end
local rows = cmsgpack.unpack(ARGV[3])
if type(rows) ~= 'table' or #rows == 0 then error('settle: no rows') end
for _, row in ipairs(list(rows)) do
  if type(row[2]) ~= 'string' or not KEYS[2 + whole(row[1])] or row[1] < 1 then
    error('settle: unknown workspace or key')
  end
  for field = 3, 7 do whole(row[field]) end
  if row[4] > row[3] then error('settle: charge above hold') end
  for _, at in ipairs(list(row[8])) do whole(at) end
end
if #ARGV[4] == 0 then error('settle: no events') end

local last = redis.call('HGET', KEYS[2], boot)
if last == 'fenced' then return redis.error_reply('FENCED this boot was retired') end
if last and tonumber(last) >= number then return '' end

local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local today = math.floor(now / DAY)

redis.call('HDEL', KEYS[2], boot)
redis.call('HSET', KEYS[2], boot, ARGV[2])

for _, row in ipairs(rows) do
  local hash, key_id = KEYS[2 + row[1]], row[2]
  local lease_field = 'l:' .. boot .. ':' .. key_id
  local found = redis.call('HMGET', hash, 'w', 'k:' .. key_id, 'c:' .. key_id, lease_field)
  -- An unknown workspace has no wallet to change; its events are kept all the same.
  if found[1] then
    local w = cmsgpack.unpack(found[1])
    local k = found[2] and cmsgpack.unpack(found[2]) or {0, 0, 0, 0, 0, 0, 0, -1}
    local c = found[3] and cmsgpack.unpack(found[3]) or {0, 0, 0, 0, 0, 0, 0, 0, 0}
    local l = found[4] and cmsgpack.unpack(found[4]) or {0, 0, 0}
    local credits, tokens = math.min(row[3], l[1]), math.min(row[5], l[2])
    local slots = math.min(row[7], l[3])
    l[1], l[2], l[3] = l[1] - credits, l[2] - tokens, l[3] - slots
    w[1], w[2] = w[1] - row[4], w[2] - credits
    c[6], c[7], c[8], c[9] = c[6] - slots, c[7] - credits, c[8] - tokens, c[9] + row[4]
    -- A bucket is never more than full, though tokens were asked for under a wider limit.
    if k[5] > 0 and row[6] > 0 then
      local drained_at = math.max(c[3], now) + math.ceil(row[6] * MINUTE / k[5])
      c[3] = math.min(now + MINUTE, drained_at)
    end
    if c[4] ~= today then c[4], c[5] = today, 0 end
    c[5] = c[5] + row[6]
    -- A void gives its request back, if the bucket has not been full since it was taken and
    -- it is younger than a full bucket: an older one has drained away like any other.
    if k[4] > 0 and c[1] > now then
      local gap = math.ceil(MINUTE / k[4])
      for _, at in ipairs(row[8]) do
        if at >= c[2] and at > now - k[4] * gap then c[1] = c[1] - gap end
      end
    end
    local wallet, counters = cmsgpack.pack(w), cmsgpack.pack(c)
    if found[4] then
      redis.call('HSET', hash, 'w', wallet, 'c:' .. key_id, counters,
        lease_field, cmsgpack.pack(l))
    else  -- released before it was settled
      redis.call('HSET', hash, 'w', wallet, 'c:' .. key_id, counters)
    end
  end
end
return redis.call('XADD', KEYS[1], '*', 'b', boot, 'n', ARGV[2], 'e', ARGV[4])
