"""What this worker holds of the shared limits, per key: take, admit from it, give back.

Owns one `KeyLease` per active key and the calls to `lease.lua`. Each call carries the
worker's own figures for the key, so a reply lost on the way heals itself at the next call.

Theory of operation: a cold key leases exactly what one request needs. A hot key leases ahead,
some tens of milliseconds' worth of its recent rate, and is then admitted here by comparing
integers. What is leased ahead is already taken from the shared limits, so they stay strict.
The right to admit from it ends a second after the call that brought it was sent, by the
monotonic clock, so a worker that was paused wakes up without it. What is not used is given
back when the key has been quiet for a tenth of a second, and at once when it is recalled.

At most one call per key is under way; requests arriving meanwhile wait and go together in the
next one, each judged in order. A request refused while other workers hold unused what it
needs is asked for again a few milliseconds later, after a recall.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from accounting.contract import keyspace
from accounting.contract.errors import Failure, InvalidKey, Unavailable
from accounting.contract.figures import pack_figures, unpack_figures
from accounting.contract.keyspace import KeyRecord
from accounting.contract.scripts import SCRIPTS
from proxy.admission import Hold, rate_headers, refusal
from proxy.key_lease import Ask, KeyLease, OnAdmission, Stale
from proxy.redis_pipe import RedisPipe, pack

_LEASE = SCRIPTS["lease"].digest
_RELEASE = SCRIPTS["release"].digest
_FORGET_SECONDS = 30.0
_AHEAD_SECONDS = 0.05  # how long what is leased ahead should last at the recent rate
_AHEAD_REQUESTS = 512
_RECALLED_SECONDS = 1.0  # nothing is leased ahead for so long after a recall
_RECALL_PAUSES = (0.002, 0.005, 0.01, 0.02)
_UNKNOWN, _STALE = 1, 2
_HEAD, _PER_ASK, _TAIL = 5, 5, 5


class Leases:
    """All leases of this worker."""

    def __init__(
        self, pipe: RedisPipe, boot: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._pipe = pipe
        self._boot = boot
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._leases: dict[str, KeyLease] = {}
        self._hot: set[KeyLease] = set()
        self.may_lease_ahead = False  # only while recalls are heard

    def __repr__(self) -> str:
        return f"Leases({list(self._leases.values())!r})"

    def of(self, record: KeyRecord) -> KeyLease:
        lease = self._leases.get(record.key_id)
        if lease is None:
            lease = self._leases[record.key_id] = KeyLease(record, self._boot)
        return lease

    def admit(self, record: KeyRecord, ask: Ask) -> KeyLease:
        """Ask for one request; `ask.on_admission` gets a Hold, a Failure or Stale: before
        this returns, where the worker holds enough."""
        lease = self.of(record)
        lease.admitted += 1
        if lease.free_requests and not lease.waiting:
            now = self._clock()
            hold = lease.take_unused(ask, now)
            if hold is not None:
                lease.quiet = False
                if lease.free_requests < lease.low_water and not lease.calling:
                    self._call(lease)
                ask.on_admission(hold)
                return lease
        lease.waiting.append(ask)
        if not lease.calling:
            self._call(lease)
        return lease

    def _call(self, lease: KeyLease, giving_back: bool = False) -> None:
        """Tell Redis what is held, ask for what waits, and lease ahead for a hot key."""
        now = self._clock()
        asks, lease.waiting = lease.waiting, []
        if asks or now >= lease.right_until or now < lease.recalled_until:
            lease.give_up_unused()
        if asks:
            lease.each = asks[-1].credits_ucr, asks[-1].tokens
            lease.version = min([ask.version for ask in asks])
        figures = [
            lease.version,
            lease.credits,
            lease.tokens,
            lease.slots,
            lease.free_requests,
            lease.free_credits,
            lease.free_tokens,
            lease.used,
            0 if giving_back else self._ahead(lease, now),
            *lease.each,
        ]
        for ask in asks:
            figures += (ask.credits_ucr, ask.tokens, ask.model_allowed)
        used, lease.used = lease.used, 0
        lease.calling = True
        lease.owes = False
        lease.last_used = now
        command = pack(("EVALSHA", _LEASE, 2, *lease.field_words, pack_figures(*figures)))
        self._pipe.send(command, lambda reply: self._answered(lease, asks, used, now, reply))

    def _ahead(self, lease: KeyLease, now: float) -> int:
        """How many requests to lease ahead: what the recent rate uses in a short while."""
        elapsed = now - lease.last_used
        admitted, lease.admitted = lease.admitted, 0
        if not self.may_lease_ahead or now < lease.recalled_until or elapsed <= 0:
            return 0
        wanted = int(admitted * _AHEAD_SECONDS / max(elapsed, 0.001))
        return max(0, min(wanted, _AHEAD_REQUESTS) - lease.free_requests)

    def _answered(
        self, lease: KeyLease, asks: list[Ask], used: int, sent_at: float, reply: Any
    ) -> None:
        if isinstance(reply, bytes):
            figures = unpack_figures(reply)
            self._note(lease, figures, sent_at)
            lease.calling = False  # not before: a call must tell of what is granted next
            self._grant(lease, asks, figures)
        else:
            lease.calling = False
            lease.right_until = 0.0
            lost = isinstance(reply, Exception)
            if lost:
                lease.used += used
            if lease.give_up_unused() or lease.used or lost:  # it may have granted: nobody knows
                lease.owes = True
                self._hot.add(lease)  # tell Redis at once, or as soon as it is back
            if reply == _UNKNOWN:
                self._ask_epoch(asks)
            elif reply == _STALE:
                self._tell_all(asks, Stale())
            else:
                self._tell_all(asks, Unavailable())
        if lease.calling:
            return
        if lease.waiting:
            self._call(lease)
        elif lease.owes and not isinstance(reply, Exception):
            self._call(lease, giving_back=True)

    def _note(self, lease: KeyLease, reply: tuple[int, ...], sent_at: float) -> None:
        """What the call brought beside its verdicts."""
        now_us, _, _, lease.requests_per_minute, lease.tokens_per_minute = reply[:_HEAD]
        ahead, right_us, _, lease.requests_tat, lease.tokens_tat = reply[-_TAIL:]
        lease.clock_offset_us = now_us - int(self._clock() * 1e6)
        if ahead:
            credits_each, tokens_each = lease.each
            lease.free_requests += ahead
            lease.free_credits += ahead * credits_each
            lease.free_tokens += ahead * tokens_each
            lease.credits += ahead * credits_each
            lease.tokens += ahead * tokens_each
            lease.slots += ahead
            lease.low_water = lease.free_requests // 4
            lease.right_until = sent_at + right_us / 1e6
            lease.quiet = False
            self._hot.add(lease)
        if sent_at < lease.recalled_until:
            self._give_back(lease)

    def _grant(self, lease: KeyLease, asks: list[Ask], reply: tuple[int, ...]) -> None:
        now, rpm, tpm = reply[0], reply[3], reply[4]
        elsewhere = reply[-3]
        told: list[tuple[OnAdmission, Hold | Failure]] = []
        again: list[Ask] = []
        at = _HEAD
        for ask in asks:
            verdict, detail_1, detail_2, requests_tat, tokens_tat = reply[at : at + _PER_ASK]
            at += _PER_ASK
            if verdict:
                if elsewhere and verdict >= 4 and ask.tries < len(_RECALL_PAUSES):
                    again.append(ask)
                    continue
                failure = refusal(verdict, detail_1, detail_2, ask.credits_ucr)
                told.append((ask.on_admission, failure))
                continue
            lease.take(ask.credits_ucr, ask.tokens)
            lines = rate_headers(now, rpm, tpm, requests_tat, tokens_tat)
            told.append((ask.on_admission, Hold(ask.credits_ucr, ask.tokens, now, lines)))
        if again:
            self._recall(lease, again)
        for on_admission, outcome in told:
            _tell(on_admission, outcome)

    def _tell_all(self, asks: list[Ask], outcome: Failure | Stale) -> None:
        for ask in asks:
            _tell(ask.on_admission, outcome)

    def _ask_epoch(self, asks: list[Ask]) -> None:
        """Workspace or key not in Redis: a lost Redis (503), or truly gone (401)."""

        def answered(filled: object) -> None:
            self._tell_all(asks, InvalidKey() if filled == 1 else Unavailable())

        self._pipe.send(pack(("EXISTS", keyspace.EPOCH)), answered)

    # Recall

    def _recall(self, lease: KeyLease, asks: list[Ask]) -> None:
        """Others hold unused what these need: call it back, and ask again shortly."""
        self._pipe.send(
            pack(("PUBLISH", keyspace.RECALL_CHANNEL, lease.workspace_id)), _ignore_reply
        )
        lease.recalled_until = self._clock() + _RECALLED_SECONDS
        pause = _RECALL_PAUSES[max([ask.tries for ask in asks])]
        for ask in asks:
            ask.tries += 1
        self._loop.call_later(pause, self._ask_again, lease, asks)

    def _ask_again(self, lease: KeyLease, asks: list[Ask]) -> None:
        lease.waiting[:0] = asks
        if not lease.calling:
            self._call(lease)

    def recalled(self, workspace_id: str) -> None:
        """Give back, at once, what is leased ahead under any key of this workspace."""
        until = self._clock() + _RECALLED_SECONDS
        for lease in self._leases.values():
            if lease.workspace_id == workspace_id:
                lease.recalled_until = until
                self._give_back(lease)

    def give_back_all(self) -> None:
        """Recalls are no longer heard: hold nothing that one could ask for."""
        for lease in list(self._hot):
            self._give_back(lease)

    def _give_back(self, lease: KeyLease) -> None:
        self._hot.discard(lease)
        if not (lease.give_up_unused() or lease.used or lease.owes):
            return  # what was used up is unused to Redis until it is told
        if lease.calling:
            lease.owes = True
        else:
            self._call(lease, giving_back=True)

    def declare(self) -> None:
        """Tell Redis what is held under every key: it may have lost it."""
        for lease in self._leases.values():
            lease.give_up_unused()
            if lease.calling:
                lease.owes = True
            else:
                self._call(lease, giving_back=True)

    def tell(self, lease: KeyLease) -> None:
        """Tell Redis what is held under this key: it may hold more than that."""
        if lease.calling:
            lease.owes = True
        elif self._leases.get(lease.key_id) is lease:
            self._call(lease, giving_back=True)

    @property
    def calling(self) -> bool:
        """Some key's call is under way."""
        return any(lease.calling for lease in self._leases.values())

    def holds(self, key_id: str) -> bool:
        return key_id in self._leases

    # Giving back

    def release_unused(self) -> None:
        """About ten times a second: give back what nobody has asked for since the last time,
        and tell of what was used: to Redis it is unused, and past its deadline anyone's."""
        if not self._pipe.up:
            return  # nobody can be told
        now = self._clock()
        for lease in list(self._hot):
            if lease.quiet or now >= lease.right_until:
                self._give_back(lease)
                continue
            lease.quiet = True
            if lease.used and not lease.calling:
                self._call(lease)

    def release_idle(self) -> None:
        """Forget the leases of keys that have been quiet for long."""
        before = self._clock() - _FORGET_SECONDS
        for lease in list(self._leases.values()):
            if lease.last_used < before and not (lease.slots or lease.waiting or lease.calling):
                self._release(lease)

    def release_all(self) -> None:
        """At the end of a worker: nothing is in flight any more."""
        for lease in list(self._leases.values()):
            lease.give_up_unused()
            if lease.used and not lease.calling:
                self._call(lease, giving_back=True)  # ahead of the release, on the same pipe
            if not lease.slots:
                self._release(lease)

    def _release(self, lease: KeyLease) -> None:
        del self._leases[lease.key_id]
        self._hot.discard(lease)
        command = pack(("EVALSHA", _RELEASE, 2, *lease.field_words))
        self._pipe.send(command, lambda reply: self._released(lease, reply))

    def _released(self, lease: KeyLease, reply: object) -> None:
        """A release that failed is tried again, unless the key is in use once more."""
        if isinstance(reply, Exception):
            self._leases.setdefault(lease.key_id, lease)


def _ignore_reply(reply: object) -> None:
    """Nothing depends on it: a recall that was lost is made good by its retry."""


def _tell(on_admission: OnAdmission, outcome: Hold | Failure | Stale) -> None:
    """One exchange's bug must not cost the others their answer."""
    try:
        on_admission(outcome)
    except Exception as error:
        loop = asyncio.get_running_loop()
        loop.call_exception_handler({"message": "on_admission", "exception": error})
