-- lease: admit requests of one key against every limit at once, and take what they need.
--
-- KEYS[1] {sNN}:ws:<workspace>     hash: w, k:<key>, c:<key>, l:<boot>:<key>
-- KEYS[2] {sNN}:leases:<boot>      set of <workspace>|<key> leased by this boot
-- ARGV[1] boot  ARGV[2] key id  ARGV[3] workspace id
-- ARGV[4] MessagePack: {version,
--         {credits, tokens, slots the worker holds in all; of these unused: requests, credits,
--          tokens; requests it admitted by itself since its last call},
--         {{credits, tokens, model_allowed}, ...} one ask per request, in order,
--         {requests, credits each, tokens each} to lease ahead}; the worker's last four figures
--         together, and the fourth part, may be left out
-- reply   {0, now_us, balance, held, rpm, tpm, then per ask: verdict, detail_1, detail_2,
--          requests_tat, tokens_tat; then requests leased ahead, for how many µs they may be
--          admitted, 1 if others hold unused what a refused ask needs, requests_tat, tokens_tat}
--         {1} workspace or key unknown here   {2} the worker's key record is stale; with a
--         fourth part, what the worker holds less than before has still been given back
--         error FENCED: the boot was retired, see fence.lua
--         Arrival times count what others hold as used, not what this worker has ahead.
-- verdicts 0 admitted; 1 key revoked or expired; 2 suspended; 3 model not allowed;
--         4 requests/minute (wait_us); 5 tokens/minute (wait_us); 6 tokens/day (wait_us);
--         7 concurrency (0); 8 above a token limit for ever (limit, asked);
--         9 cost cap (cap, spent + held); 10 balance (balance, held)
--
-- Invariant: a refused ask takes nothing; held <= balance; spent + held <= cap;
-- bucket level + what is held <= the limits per minute; open <= concurrency. What is leased
-- ahead is held like what is in flight, so the limits stay as strict; it is an eighth of what
-- is left at most, so the last of it is never locked away.
-- All checks and refusals come before the first write.

local MINUTE = 60000000
local DAY = 86400000000
local MAX = 9000000000000000
local RIGHT = 1000000     -- a lease admits for this long, by the worker's clock
local DEADLINE = 1100000  -- and surely no longer after this long, by Redis's
local SHARE = 8

local function whole(x)
  if type(x) ~= 'number' or x < 0 or x > MAX or x ~= math.floor(x) then
    error('lease: expected a whole number')
  end
  return x
end

local boot, key_id, workspace_id = ARGV[1], ARGV[2], ARGV[3]
local message = cmsgpack.unpack(ARGV[4])
local version, mine, asks = whole(message[1]), message[2], message[3]
local figures = 0
for _ in pairs(mine) do figures = figures + 1 end
if figures == 3 then mine[4], mine[5], mine[6], mine[7] = 0, 0, 0, 0 end
for field = 1, 7 do whole(mine[field]) end
local ahead = message[4] or {0, 0, 0}
whole(ahead[1]); whole(ahead[2]); whole(ahead[3])
local asked = 0
for _, ask in pairs(asks) do
  whole(ask[1]); whole(ask[2]); whole(ask[3])
  asked = asked + 1
end
if asked ~= #asks then error('lease: expected a list of asks') end

local lease_field = 'l:' .. boot .. ':' .. key_id
local found = redis.call('HMGET', KEYS[1], 'w', 'k:' .. key_id, 'c:' .. key_id, lease_field)
if not found[1] or not found[2] then return {1} end
if not found[4] and redis.call('SISMEMBER', KEYS[2], 'fenced') == 1 then
  return redis.error_reply('FENCED this boot was retired')  -- long on its way, or presumed dead
end
local w, k = cmsgpack.unpack(found[1]), cmsgpack.unpack(found[2])
local stale = k[1] ~= version
if stale and not message[4] then return {2} end
if stale then asks, ahead = {}, {0, 0, 0} end
local c = found[3] and cmsgpack.unpack(found[3]) or {0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
local l = found[4] and cmsgpack.unpack(found[4]) or {0, 0, 0}
for field = 4, 7 do l[field] = l[field] or 0 end

local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local today = math.floor(now / DAY)
local state, expires, rpm, tpm, daily, slots, cap = k[2], k[3], k[4], k[5], k[6], k[7], k[8]
local balance, held = w[1], w[2]
local requests_tat, busy_since, tokens_tat = c[1], c[2], c[3]
local day_tokens = c[4] == today and c[5] or 0
local open, held_key, held_tokens, spent = c[6], c[7], c[8], c[9]
local held_requests, unused = c[10] or 0, w[5] or 0

-- A reply that was lost leaves a lease the worker does not know of: bring it back first.
local corrected = mine[7] > 0
for field = 1, 6 do corrected = corrected or l[field] ~= mine[field] end
held = held - l[1] + mine[1]
held_key = held_key - l[1] + mine[1]
held_tokens = held_tokens - l[2] + mine[2]
open = open - l[3] + mine[3]
held_requests = held_requests - l[4] + mine[4]
unused = unused - l[5] + mine[5]
for field = 1, 6 do l[field] = mine[field] end

-- A request fills its bucket by one gap; a full bucket holds exactly rpm requests.
local request_gap = rpm > 0 and math.ceil(MINUTE / rpm) or 0
local request_room = rpm * request_gap

local function level(tat) return tat > now and tat - now or 0 end

local function count_requests(n)
  if rpm == 0 then return end
  if requests_tat <= now then requests_tat, busy_since = now, now end
  requests_tat = requests_tat + n * request_gap
end
if mine[7] > 0 then count_requests(mine[7]) end

local function refusal(credits, tokens, model_allowed)
  if state ~= 1 or (expires > 0 and now >= expires) then return 1, 0, 0 end
  if w[3] ~= 1 then return 2, 0, 0 end
  if model_allowed ~= 1 then return 3, 0, 0 end
  local requests = level(requests_tat) + (held_requests + 1) * request_gap
  if rpm > 0 and requests > request_room then return 4, requests - request_room, 0 end
  if tpm > 0 then
    if tokens > tpm then return 8, tpm, tokens end
    local asked = math.ceil((held_tokens + tokens) * MINUTE / tpm)
    if level(tokens_tat) + asked > MINUTE then
      return 5, math.min(MINUTE, level(tokens_tat) + asked - MINUTE), 0
    end
  end
  if daily > 0 then
    if tokens > daily then return 8, daily, tokens end
    if day_tokens + held_tokens + tokens > daily then return 6, (today + 1) * DAY - now, 0 end
  end
  if slots > 0 and open + 1 > slots then return 7, 0, 0 end
  if cap >= 0 and spent + held_key + credits > cap then return 9, cap, spent + held_key end
  if balance - held - credits < 0 then return 10, balance, held end
  return 0, 0, 0
end

-- How many requests of this size an eighth of what is left would do for.
local function share()
  local n = ahead[1]
  local function at_most(left, each)
    if each > 0 then n = math.min(n, math.floor(math.max(0, left) / (SHARE * each))) end
  end
  at_most(balance - held, ahead[2])
  if cap >= 0 then at_most(cap - spent - held_key, ahead[2]) end
  if rpm > 0 then
    at_most(request_room - level(requests_tat) - held_requests * request_gap, request_gap)
  end
  if tpm > 0 then
    at_most(math.floor((MINUTE - level(tokens_tat)) * tpm / MINUTE) - held_tokens, ahead[3])
  end
  if daily > 0 then at_most(daily - day_tokens - held_tokens, ahead[3]) end
  if slots > 0 then at_most(slots - open, 1) end
  return n
end

local function requests_at()
  return requests_tat + (held_requests - l[4]) * request_gap
end

local function tokens_at()
  if tpm == 0 then return 0 end
  return math.max(tokens_tat, now) + math.ceil((held_tokens - l[6]) * MINUTE / tpm)
end

local reply = {0, now, balance, held, rpm, tpm}
local taken, refused, elsewhere = 0, 0, 0
for _, ask in ipairs(asks) do
  local verdict, detail_1, detail_2 = refusal(ask[1], ask[2], ask[3])
  if verdict == 0 then
    taken = taken + 1
    count_requests(1)
    held, held_key = held + ask[1], held_key + ask[1]
    held_tokens, open = held_tokens + ask[2], open + 1
    l[1], l[2], l[3] = l[1] + ask[1], l[2] + ask[2], l[3] + 1
  else
    refused = refused + 1
    if verdict == 10 and unused > l[5] then elsewhere = 1 end
    if verdict >= 4 and verdict ~= 8 and held_requests > l[4] then elsewhere = 1 end
  end
  local n = #reply
  reply[n + 1], reply[n + 2], reply[n + 3] = verdict, detail_1, detail_2
  reply[n + 4], reply[n + 5] = requests_at(), tokens_at()
end

local extra = 0
if ahead[1] > 0 and refused == 0 and refusal(0, 0, 1) == 0 then
  extra = share()
  held, held_key = held + extra * ahead[2], held_key + extra * ahead[2]
  held_tokens, open = held_tokens + extra * ahead[3], open + extra
  held_requests, unused = held_requests + extra, unused + extra * ahead[2]
  l[1], l[2], l[3] = l[1] + extra * ahead[2], l[2] + extra * ahead[3], l[3] + extra
  l[4], l[5], l[6] = l[4] + extra, l[5] + extra * ahead[2], l[6] + extra * ahead[3]
end
local right = RIGHT
if expires > 0 then right = math.max(0, math.min(right, expires - now)) end
if l[4] > 0 then l[7] = now + DEADLINE end
reply[3], reply[4] = balance, held
local n = #reply
reply[n + 1], reply[n + 2], reply[n + 3] = extra, right, elsewhere
reply[n + 4], reply[n + 5] = requests_at(), tokens_at()

if taken > 0 or extra > 0 or corrected then
  if not found[4] then redis.call('SADD', KEYS[2], workspace_id .. '|' .. key_id) end
  w[2], w[5] = held, unused
  redis.call('HSET', KEYS[1],
    'w', cmsgpack.pack(w),
    'c:' .. key_id, cmsgpack.pack({requests_tat, busy_since, tokens_tat, today, day_tokens,
      open, held_key, held_tokens, spent, held_requests}),
    lease_field, cmsgpack.pack(l))
end
if stale then return {2} end
return reply
