-- lease: admit requests of one key against every limit at once, and take what they need.
--
-- KEYS[1] {sNN}:ws:<workspace>     hash: w, k:<key>, c:<key>, l:<boot>:<key>
-- KEYS[2] {sNN}:leases:<boot>      set of <workspace>|<key> leased by this boot
-- ARGV[1] boot  ARGV[2] key id  ARGV[3] workspace id
-- ARGV[4] figures (unsigned 64-bit, little-endian): version;
--         credits, tokens, slots the worker holds in all; of these unused: requests, credits,
--         tokens; requests it admitted by itself since its last call;
--         requests, credits each, tokens each to lease ahead;
--         then per request, in order: credits, tokens, 1 if its model is allowed
-- reply   figures (signed 64-bit, little-endian): now_us, balance, held, rpm, tpm;
--         per ask: verdict, detail_1, detail_2, requests_tat, tokens_tat;
--         requests leased ahead, for how many µs they may be admitted, 1 if others hold unused
--         what a refused ask needs, requests_tat, tokens_tat.
--         Or the number 1: workspace or key unknown here; 2: the worker's key record is stale,
--         though what the worker holds less than before has been given back;
--         error FENCED: the boot was retired, see fence.lua.
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
--
-- Figures in one string: an array in a reply costs Redis 4.5 µs whatever is in it, and reading
-- nested MessagePack another 3. No closure on the way of one ask: each costs 0.1 µs per call.

local MINUTE = 60000000
local DAY = 86400000000
local MAX = 9000000000000000
local RIGHT = 1000000     -- a lease admits for this long, by the worker's clock
local DEADLINE = 1100000  -- and surely no longer after this long, by Redis's
local SHARE = 8
local HEAD, ASK = 88, 24  -- bytes of ARGV[4]

local call, ceil, floor, max, min = redis.call, math.ceil, math.floor, math.max, math.min
local unpack_figures, pack_figures = struct.unpack, struct.pack

local boot, key_id, workspace_id, figures = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
if (#figures - HEAD) % ASK ~= 0 then error('lease: expected whole asks') end
local version, my_credits, my_tokens, my_slots, my_unused, my_unused_credits, my_unused_tokens,
  used, ahead, ahead_credits, ahead_tokens = unpack_figures('<I8I8I8I8I8I8I8I8I8I8I8', figures)
if max(version, my_credits, my_tokens, my_slots, my_unused, my_unused_credits,
    my_unused_tokens, used, ahead, ahead_credits, ahead_tokens) > MAX then
  error('lease: expected whole numbers')
end

local counters_field, lease_field = 'c:' .. key_id, 'l:' .. boot .. ':' .. key_id
local found = call('HMGET', KEYS[1], 'w', 'k:' .. key_id, counters_field, lease_field)
if not found[1] or not found[2] then return 1 end
if not found[4] and call('SISMEMBER', KEYS[2], 'fenced') == 1 then
  return redis.error_reply('FENCED this boot was retired')  -- long on its way, or presumed dead
end
local w, k = cmsgpack.unpack(found[1]), cmsgpack.unpack(found[2])
local c = found[3] and cmsgpack.unpack(found[3]) or {0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
local l = found[4] and cmsgpack.unpack(found[4]) or {0, 0, 0, 0, 0, 0, 0}
local stale = k[1] ~= version

local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local today = floor(now / DAY)
local state, expires, rpm, tpm, daily, slots, cap = k[2], k[3], k[4], k[5], k[6], k[7], k[8]
local balance = w[1]
local requests_tat, tokens_tat = c[1], c[3]
local day_tokens, spent = c[4] == today and c[5] or 0, c[9]

-- A reply that was lost leaves a lease the worker does not know of: bring it back first.
local was_unused, was_unused_credits = l[4] or 0, l[5] or 0
local changed = used > 0 or l[1] ~= my_credits or l[2] ~= my_tokens or l[3] ~= my_slots
  or was_unused ~= my_unused or was_unused_credits ~= my_unused_credits
  or (l[6] or 0) ~= my_unused_tokens
local held, held_key = w[2] - l[1] + my_credits, c[7] - l[1] + my_credits
local held_tokens, open = c[8] - l[2] + my_tokens, c[6] - l[3] + my_slots
local held_requests = (c[10] or 0) - was_unused + my_unused
local unused = (w[5] or 0) - was_unused_credits + my_unused_credits

-- A request fills its bucket by one gap; a full bucket holds exactly rpm requests.
local request_gap = rpm > 0 and ceil(MINUTE / rpm) or 0
local request_room = rpm * request_gap
if used > 0 and rpm > 0 then
  if requests_tat <= now then requests_tat, c[2] = now, now end
  requests_tat = requests_tat + used * request_gap
end

local barred = stale and 1 or 0  -- the verdict on every ask
if state ~= 1 or (expires > 0 and now >= expires) then barred = 1
elseif w[3] ~= 1 then barred = 2 end

local verdicts, refused, elsewhere = '', false, 0
local tokens_now = 0  -- when the token bucket would be empty, were all that others hold used
for at = HEAD + 1, #figures, ASK do
  local credits, tokens, model_allowed = unpack_figures('<I8I8I8', figures, at)
  if max(credits, tokens, model_allowed) > MAX then error('lease: expected whole numbers') end
  local verdict, detail_1, detail_2 = 0, 0, 0
  local requests, wanted = 0, 0
  if rpm > 0 then
    requests = max(requests_tat - now, 0) + (held_requests + 1) * request_gap - request_room
  end
  if tpm > 0 then
    wanted = max(tokens_tat - now, 0) + ceil((held_tokens + tokens) * MINUTE / tpm) - MINUTE
  end
  if barred > 0 then verdict = barred
  elseif model_allowed ~= 1 then verdict = 3
  elseif requests > 0 then verdict, detail_1 = 4, requests
  elseif tpm > 0 and tokens > tpm then verdict, detail_1, detail_2 = 8, tpm, tokens
  elseif wanted > 0 then verdict, detail_1 = 5, min(MINUTE, wanted)
  elseif daily > 0 and tokens > daily then verdict, detail_1, detail_2 = 8, daily, tokens
  elseif daily > 0 and day_tokens + held_tokens + tokens > daily then
    verdict, detail_1 = 6, (today + 1) * DAY - now
  elseif slots > 0 and open + 1 > slots then verdict = 7
  elseif cap >= 0 and spent + held_key + credits > cap then
    verdict, detail_1, detail_2 = 9, cap, spent + held_key
  elseif balance - held - credits < 0 then verdict, detail_1, detail_2 = 10, balance, held
  end
  if verdict == 0 then
    changed = true
    if rpm > 0 then
      if requests_tat <= now then requests_tat, c[2] = now, now end
      requests_tat = requests_tat + request_gap
    end
    held, held_key = held + credits, held_key + credits
    held_tokens, open = held_tokens + tokens, open + 1
    my_credits, my_tokens, my_slots = my_credits + credits, my_tokens + tokens, my_slots + 1
  else
    refused = true
    if verdict == 10 and unused > my_unused_credits then elsewhere = 1 end
    if verdict >= 4 and verdict ~= 8 and held_requests > my_unused then elsewhere = 1 end
  end
  if tpm > 0 then
    tokens_now = max(tokens_tat, now) + ceil((held_tokens - my_unused_tokens) * MINUTE / tpm)
  end
  verdicts = verdicts .. pack_figures('<i8i8i8i8i8', verdict, detail_1, detail_2,
    requests_tat + (held_requests - my_unused) * request_gap, tokens_now)
end

-- As many requests of this size as an eighth of what is left would do for.
local extra = 0
if ahead > 0 and not refused and barred == 0 then
  extra = ahead
  local function at_most(left, each)
    if each > 0 then extra = min(extra, floor(max(0, left) / (SHARE * each)))
    elseif left < 0 then extra = 0 end
  end
  at_most(balance - held, ahead_credits)
  if cap >= 0 then at_most(cap - spent - held_key, ahead_credits) end
  if rpm > 0 then
    local level = max(requests_tat - now, 0)
    at_most(request_room - level - held_requests * request_gap, request_gap)
  end
  if tpm > 0 then
    local level = max(tokens_tat - now, 0)
    at_most(floor((MINUTE - level) * tpm / MINUTE) - held_tokens, ahead_tokens)
  end
  if daily > 0 then at_most(daily - day_tokens - held_tokens, ahead_tokens) end
  if slots > 0 then at_most(slots - open, 1) end
end
if extra > 0 then
  local credits, tokens = extra * ahead_credits, extra * ahead_tokens
  held, held_key, unused = held + credits, held_key + credits, unused + credits
  held_tokens, open, held_requests = held_tokens + tokens, open + extra, held_requests + extra
  my_credits, my_tokens, my_slots = my_credits + credits, my_tokens + tokens, my_slots + extra
  my_unused, my_unused_credits = my_unused + extra, my_unused_credits + credits
  my_unused_tokens = my_unused_tokens + tokens
  changed = true
end

if changed then
  if not found[4] then call('SADD', KEYS[2], workspace_id .. '|' .. key_id) end
  w[2], w[5] = held, unused
  c[1], c[3], c[4], c[5] = requests_tat, tokens_tat, today, day_tokens
  c[6], c[7], c[8], c[10] = open, held_key, held_tokens, held_requests
  l[1], l[2], l[3] = my_credits, my_tokens, my_slots
  l[4], l[5], l[6] = my_unused, my_unused_credits, my_unused_tokens
  l[7] = my_unused > 0 and now + DEADLINE or l[7] or 0
  call('HSET', KEYS[1], 'w', cmsgpack.pack(w), counters_field, cmsgpack.pack(c),
    lease_field, cmsgpack.pack(l))
end
if stale then return 2 end

local right = RIGHT
if expires > 0 then right = max(0, min(right, expires - now)) end
if tpm > 0 then
  tokens_now = max(tokens_tat, now) + ceil((held_tokens - my_unused_tokens) * MINUTE / tpm)
end
return pack_figures('<i8i8i8i8i8', now, balance, held, rpm, tpm) .. verdicts
  .. pack_figures('<i8i8i8i8i8', extra, right, elsewhere,
    requests_tat + (held_requests - my_unused) * request_gap, tokens_now)
