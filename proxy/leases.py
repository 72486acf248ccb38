"""What this worker holds of the shared limits, per key: take, account for, give back.

Owns one `KeyLease` per active key and the calls to `lease.lua`. Each call carries the
worker's own total for the key, so a reply lost on the way heals itself at the next call.

Theory of operation: at most one call per key is under way; requests arriving meanwhile wait
and go together in the next one, each judged in order. So N concurrent requests of one key
cost Redis about one call per round trip, and a lone request exactly one. Every lease is a
lease of one request; a growing lease would add one more ask to the same call.
"""

import asyncio
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from accounting.contract import keyspace
from accounting.contract.errors import Failure, InvalidKey, Unavailable
from accounting.contract.keyspace import KeyRecord
from accounting.contract.scripts import SCRIPTS
from proxy.admission import Hold, rate_headers, refusal
from proxy.redis_pipe import RedisPipe, pack

_encode = msgspec.msgpack.Encoder().encode
_LEASE = SCRIPTS["lease"].digest
_RELEASE = SCRIPTS["release"].digest
_IDLE_SECONDS = 30.0
_OK, _UNKNOWN = 0, 1
_HEAD, _PER_ASK = 6, 5


class Stale(Exception):
    """The key record used is no longer current: read it again and ask again."""


OnAdmission = Callable[[Hold | Failure | Stale], None]


class Ask(NamedTuple):
    credits_ucr: int
    tokens: int
    model_allowed: int
    version: int
    on_admission: OnAdmission


class KeyLease:
    """What this worker holds under one key (µcr, tokens, requests) and who waits for more."""

    __slots__ = (
        "calling", "credits", "field_words", "key_id", "last_used", "shard", "slots", "tokens",
        "waiting", "workspace_id", "workspace_key",
    )  # fmt: skip

    def __init__(self, record: KeyRecord, boot: str) -> None:
        self.key_id = record.key_id
        self.workspace_id = record.workspace_id
        self.workspace_key = keyspace.workspace_key(record.workspace_id)
        self.shard = keyspace.shard_of(record.workspace_id)
        self.field_words = (
            self.workspace_key,
            keyspace.leases_key(self.shard, boot),
            boot,
            record.key_id,
            record.workspace_id,
        )
        self.credits = self.tokens = self.slots = 0
        self.waiting: list[Ask] = []
        self.calling = False
        self.last_used = 0.0

    def __repr__(self) -> str:
        return f"KeyLease({self.key_id}, {self.credits} µcr, {self.slots} open)"

    def take(self, credits_ucr: int, tokens: int) -> None:
        """A hold was granted; or its settle was sent, and no one knows whether it arrived."""
        self.credits += credits_ucr
        self.tokens += tokens
        self.slots += 1

    def drop(self, credits_ucr: int, tokens: int) -> None:
        """A hold's settle was written to Redis's connection, ahead of any later lease call.

        Not before: the next call would correct Redis to what this lease says, giving the
        hold back while its charge is still to come.
        """
        self.credits -= credits_ucr
        self.tokens -= tokens
        self.slots -= 1


class Leases:
    """All leases of this worker."""

    def __init__(self, pipe: RedisPipe, boot: str, now: Callable[[], float]) -> None:
        self._pipe = pipe
        self._boot = boot
        self._now = now
        self._leases: dict[str, KeyLease] = {}

    def __repr__(self) -> str:
        return f"Leases({list(self._leases.values())!r})"

    def of(self, record: KeyRecord) -> KeyLease:
        lease = self._leases.get(record.key_id)
        if lease is None:
            lease = self._leases[record.key_id] = KeyLease(record, self._boot)
        return lease

    def admit(self, record: KeyRecord, ask: Ask) -> KeyLease:
        """Ask for one request; `ask.on_admission` gets a Hold, a Failure or Stale."""
        lease = self.of(record)
        lease.waiting.append(ask)
        if not lease.calling:
            self._call(lease)
        return lease

    def _call(self, lease: KeyLease) -> None:
        asks, lease.waiting = lease.waiting, []
        lease.calling = True
        lease.last_used = self._now()
        message = _encode(
            (
                min([ask.version for ask in asks]),
                (lease.credits, lease.tokens, lease.slots),
                [(ask.credits_ucr, ask.tokens, ask.model_allowed) for ask in asks],
            )
        )
        command = pack(("EVALSHA", _LEASE, 2, *lease.field_words, message))
        self._pipe.send(command, lambda reply: self._answered(lease, asks, reply))

    def _answered(self, lease: KeyLease, asks: list[Ask], reply: Any) -> None:
        lease.calling = False
        outcome: Failure | Stale | None = None
        if not isinstance(reply, list):
            outcome = Unavailable()
        elif reply[0] == _UNKNOWN:
            self._ask_epoch(asks)
            asks = []
        elif reply[0] != _OK:
            outcome = Stale()
        if outcome is not None:
            for ask in asks:
                _tell(ask.on_admission, outcome)
        elif asks:
            self._grant(lease, asks, reply)
        if lease.waiting and not lease.calling:
            self._call(lease)

    def _grant(self, lease: KeyLease, asks: list[Ask], reply: list[int]) -> None:
        _, now, _, _, rpm, tpm = reply[:_HEAD]
        granted: list[tuple[OnAdmission, Hold | Failure]] = []
        at = _HEAD
        for ask in asks:
            verdict, detail_1, detail_2, requests_tat, tokens_tat = reply[at : at + _PER_ASK]
            at += _PER_ASK
            if verdict:
                failure = refusal(verdict, detail_1, detail_2, ask.credits_ucr)
                granted.append((ask.on_admission, failure))
                continue
            lease.take(ask.credits_ucr, ask.tokens)
            lines = rate_headers(now, rpm, tpm, requests_tat, tokens_tat)
            granted.append((ask.on_admission, Hold(ask.credits_ucr, ask.tokens, now, lines)))
        for on_admission, outcome in granted:
            _tell(on_admission, outcome)

    def _ask_epoch(self, asks: list[Ask]) -> None:
        """Workspace or key not in Redis: a lost Redis (503), or truly gone (401)."""

        def answered(filled: object) -> None:
            for ask in asks:
                _tell(ask.on_admission, InvalidKey() if filled == 1 else Unavailable())

        self._pipe.send(pack(("EXISTS", keyspace.EPOCH)), answered)

    # Giving back

    def release_idle(self) -> None:
        """Give back and forget the leases of keys that have been quiet for a while."""
        before = self._now() - _IDLE_SECONDS
        for lease in list(self._leases.values()):
            if lease.last_used < before and not (lease.slots or lease.waiting or lease.calling):
                self._release(lease)

    def release_all(self) -> None:
        """At the end of a worker: nothing is in flight any more."""
        for lease in list(self._leases.values()):
            if not (lease.slots or lease.calling):
                self._release(lease)

    def _release(self, lease: KeyLease) -> None:
        del self._leases[lease.key_id]
        command = pack(("EVALSHA", _RELEASE, 2, *lease.field_words))
        self._pipe.send(command, lambda reply: self._released(lease, reply))

    def _released(self, lease: KeyLease, reply: object) -> None:
        """A release that failed is tried again, unless the key is in use once more."""
        if isinstance(reply, Exception):
            self._leases.setdefault(lease.key_id, lease)


def _tell(on_admission: OnAdmission, outcome: Hold | Failure | Stale) -> None:
    """One exchange's bug must not cost the others their answer."""
    try:
        on_admission(outcome)
    except Exception as error:
        loop = asyncio.get_running_loop()
        loop.call_exception_handler({"message": "on_admission", "exception": error})
