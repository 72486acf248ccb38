-- put_workspace: make a workspace known, or set its state; its balance is left alone.
--
-- KEYS[1] {sNN}:ws:<workspace>
-- ARGV[1] state: 1 active, 2 suspended
-- reply   1 when the workspace was new here, else 0
--
-- Invariant: a new wallet starts empty, at delta 0; money enters through credit only.

local state = tonumber(ARGV[1])
if state ~= 1 and state ~= 2 then error('put_workspace: unknown state') end
local packed = redis.call('HGET', KEYS[1], 'w')
local w = packed and cmsgpack.unpack(packed) or {0, 0, state, 0, 0}
w[3] = state
redis.call('HSET', KEYS[1], 'w', cmsgpack.pack(w))
return packed and 0 or 1
