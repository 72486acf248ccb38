"""Every Redis key: builder, type, lifetime, hash tag; and the records kept under them.

All keys of a workspace carry the tag `{sNN}` of its shard, as does the shard's stream, so
each script touches one slot and Redis Cluster works unchanged. Records are MessagePack
arrays, read by Lua's cmsgpack and by msgspec alike.

| key | type | lifetime | holds |
|---|---|---|---|
| `{sNN}:ws:<workspace>` | hash | for good | a workspace, all of it: fields below |
| `{sNN}:usage` | stream | trimmed once posted | usage events, one entry per settled batch |
| `{sNN}:boots` | hash | for good, a field per worker boot | last batch settled, or `fenced` |
| `{sNN}:leases:<boot>` | set | while its boot is known | `<workspace>|<key>` leased, or `fenced` |
| `key:<sha256>` | string | until revoked | KeyRecord |
| `epoch` | string | for good | set when Redis has been filled from Postgres, see `is_filled` |
| `{workers}:heard` | sorted set | a boot, until retired | last heard of, ms of the clock below |
| `{workers}:fenced` | sorted set | a retired boot | keep its fence until: ms, Redis's time |
| `{workers}:clock` | hash | for good | `ms`: see `silent.lua`; `at`: when it last moved |
| `muster` | string | while Redis is rebuilt | the epoch to come: who leases, say so anew |
| `mustered:<epoch>` | hash | a minute | the boots that have, and how many batches each told late |
| `recall` | pub/sub channel | – | a workspace id: workers give back what they leased ahead |

Fields of a workspace: `w` Wallet, `k:<key>` KeyRules, `c:<key>` KeyCounters,
`l:<boot>:<key>` LeaseRecord.
"""

import hashlib
import zlib

import msgspec
from msgspec import Struct

from accounting.contract.settings import SHARDS

EPOCH = "epoch"
MUSTER = "muster"
HEARD, FENCED, CLOCK = "{workers}:heard", "{workers}:fenced", "{workers}:clock"
FENCE = "fenced"  # in place of a batch number, or of a lease
RECALL_CHANNEL = "recall"
KEY_PREFIX = "inf_"
STREAM_FIELD_BOOT, STREAM_FIELD_SEQUENCE, STREAM_FIELD_EVENTS = "b", "n", "e"
STREAM_FIELD_LATE = "l"  # present: nobody has taken the charges from the balance yet
STREAM_GROUP = "accounting"

ACTIVE, SUSPENDED = 1, 2  # a workspace's state
LIVE, REVOKED = 1, 2  # a key's state
INFERENCE, ACCOUNT = "inference", "account"  # a key's scopes: to call models, to see the account


class Wallet(Struct, array_like=True):
    """Field `w`: settled balance and credits held (µcr), state, last ledger delta applied;
    of what is held, `unused`: leased ahead by workers."""

    balance: int
    held: int
    state: int
    last_delta: int
    unused: int = 0


class KeyRules(Struct, array_like=True):
    """Field `k:<key>`: what limits a key. 0 = unlimited, except `cost_cap_ucr`: -1 = none."""

    version: int
    state: int
    expires_at_us: int = 0
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    tokens_per_day: int = 0
    concurrency: int = 0
    cost_cap_ucr: int = -1


class KeyCounters(Struct, array_like=True):
    """Field `c:<key>`: GCRA arrival times (µs), the day's tokens, what is open, what is spent.

    `requests_tat`, `tokens_tat`: theoretical arrival times; `busy_since`: when the request
    bucket last stopped being full, µs; `day`: days since the epoch.
    """

    requests_tat: int = 0
    busy_since: int = 0
    tokens_tat: int = 0
    day: int = 0
    day_tokens: int = 0
    open: int = 0
    held_ucr: int = 0
    held_tokens: int = 0
    spent_ucr: int = 0
    held_requests: int = 0


class LeaseRecord(Struct, array_like=True):
    """Field `l:<boot>:<key>`: what one worker boot has taken and not yet settled; of that,
    the unused part it leased ahead, which it may admit from until the deadline."""

    credits_ucr: int = 0
    tokens: int = 0
    slots: int = 0
    unused_requests: int = 0
    unused_ucr: int = 0
    unused_tokens: int = 0
    deadline_us: int = 0


class KeyRecord(Struct, array_like=True, frozen=True):
    """Under `key:<sha256>`: whom a secret stands for. Limits are in KeyRules, not here.

    `version` equals that of KeyRules; admission refuses a stale one and the worker reads
    again. Empty `allowed_models` = all; empty `scopes` = all.
    """

    version: int
    key_id: str
    workspace_id: str
    name: str
    scopes: list[str]
    allowed_models: list[str]


key_record_decoder = msgspec.msgpack.Decoder(KeyRecord)


def digest_of(secret: str) -> str:
    """SHA-256 of a client's key, hex: the only form in which it is stored."""
    return hashlib.sha256(secret.encode()).hexdigest()


def shard_of(workspace_id: str) -> int:
    return zlib.crc32(workspace_id.encode()) % SHARDS


def tag(shard: int) -> str:
    return f"{{s{shard:02d}}}"


def workspace_key(workspace_id: str) -> str:
    return f"{tag(shard_of(workspace_id))}:ws:{workspace_id}"


def stream_key(shard: int) -> str:
    return f"{tag(shard)}:usage"


def boots_key(shard: int) -> str:
    return f"{tag(shard)}:boots"


def leases_key(shard: int, boot: str) -> str:
    return f"{tag(shard)}:leases:{boot}"


def digest_key(digest: str) -> str:
    return f"key:{digest}"


def mustered_key(epoch: str) -> str:
    return f"mustered:{epoch}"


def epoch_of(name: str, run: str) -> str:
    """The epoch of a Redis filled in the run (`run_id`) it is in."""
    return f"{name}@{run}"


def is_filled(epoch: str | None, run: str) -> bool:
    """Whether Redis holds what the ledger says, so that the gate may be open.

    An epoch of another run says nothing: Redis may have come back without its last seconds.
    """
    name, _, filled_in = (epoch or "").partition("@")
    return bool(name) and filled_in in ("", run)
