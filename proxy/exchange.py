"""One request and its answer, told top to bottom; the only file that sees all the steps.

Theory of operation: an exchange is a small state machine driven by callbacks, no task of its
own. `begin` runs as far as it can; each later step is called by whoever finished the step
before. Obligations: once `_hold` is set, exactly one `_settle` follows, on whichever path
the exchange ends; the client gets exactly one answer, or has left; the upstream connection
is released after its answer or abandoned within it.
"""

import time
from typing import TYPE_CHECKING

from accounting.contract.errors import (
    Failure,
    ProviderTimeout,
    ScopeMissing,
    Unavailable,
)
from accounting.contract.keyspace import INFERENCE, KeyRecord
from accounting.contract.usage_event import TokenUsage
from proxy import replies, request_head
from proxy.admission import Hold
from proxy.answer import Answer, Client, Request
from proxy.bill import NOTHING, Bill, Timing
from proxy.chat_head import ChatHead
from proxy.journal import JournalFull
from proxy.key_lease import Ask, KeyLease, Stale
from proxy.keys import digest_of
from proxy.patience import Patience
from proxy.relay import Relay
from proxy.routing import Route
from proxy.settle_record import encode_settle
from proxy.upstream_connection import UpstreamConnection
from proxy.usage_scanner import StreamScanner

if TYPE_CHECKING:
    from proxy.services import Services

_UPSTREAM_PATH = "/chat/completions"
_STALE_TRIES = 3


class Exchange:
    """See the module. `services` are the worker's; the client outlives the exchange."""

    __slots__ = (
        "_answer", "_bill", "_digest", "_ended", "_head", "_hold", "_lease", "_patience",
        "_relay", "_request", "_request_id", "_route", "_services", "_slot", "_timing", "_tries",
    )  # fmt: skip

    _head: ChatHead
    _route: Route
    _bill: Bill
    _lease: KeyLease
    _relay: Relay

    def __init__(self, services: "Services", client: Client, request: Request) -> None:
        self._services = services
        self._request = request
        now, now_ns = services.now(), time.time_ns()
        self._request_id = services.request_ids.next(now_ns)
        self._timing = Timing(now, now_ns // 1000)
        self._answer = Answer(client, request, self._request_id)
        self._digest = b""
        self._hold: Hold | None = None
        self._slot = 0
        self._tries = 0
        self._ended = False
        self._patience = Patience(now)

    def __repr__(self) -> str:
        return f"Exchange({self._request_id.decode()}, ended={self._ended})"

    # [3] The key, then [2] the head, [4] the route, and what it can cost at most

    def begin(self) -> None:
        self._services.exchanges.add(self)
        head = self._request.head
        if head.digest is None:
            head.digest = digest_of(head.headers.get(b"authorization"))
        self._digest = head.digest
        self._services.keys.look_up(head.digest, self._key_found)

    def _key_found(self, found: KeyRecord | Failure) -> None:
        if self._ended:
            return
        if isinstance(found, Failure):
            self._refuse(found)
            return
        try:
            self._plan(found)
        except Failure as failure:
            self._refuse(failure)

    def _plan(self, record: KeyRecord) -> None:
        services, body = self._services, self._request.body
        head = request_head.parse(body)
        self._route = services.routing.route(head.model)
        self._head, model = head, self._route.model
        self._bill = Bill(self._request_id, record, head, model, body, self._timing)
        if record.scopes and INFERENCE not in record.scopes:
            raise ScopeMissing
        if not services.gate_open:
            raise Unavailable
        try:
            self._slot = services.journal.reserve()
        except JournalFull:
            raise Unavailable("Too much is waiting to be settled.") from None
        allowed = not record.allowed_models or model.name in record.allowed_models
        ask = Ask(
            self._bill.credits_ucr, self._bill.tokens, int(allowed), record.version, self._admitted
        )
        self._lease = services.leases.of(record)
        services.leases.admit(record, ask)

    # [5] Admission: every limit at once

    def _admitted(self, outcome: Hold | Failure | Stale) -> None:
        services = self._services
        if not isinstance(outcome, Hold):
            services.journal.free(self._slot)
            if self._ended:
                return
            if isinstance(outcome, Stale):
                self._read_key_again()
            else:
                self._refuse(outcome)
            return
        self._hold = outcome
        self._answer.extra = outcome.rate_headers
        services.journal.open(self._slot, self._bill.opening(outcome, self._route.stop))
        if self._ended:  # the client left while the decision was on its way
            self._relay = self._new_relay()
            self._settle(NOTHING, "void", "client_left")
        else:
            self._send_upstream()

    def _read_key_again(self) -> None:
        self._tries += 1
        if self._tries >= _STALE_TRIES:
            self._refuse(Unavailable())
            return
        self._services.keys.forget(self._digest)
        self.begin()

    def _refuse(self, failure: Failure) -> None:
        """Nothing was taken: answer and be done."""
        self._services.counters.refused(failure)
        self._answer.failure(failure)
        self._done()

    # [6] Upstream: the target in turn, while no byte has gone to the client

    def _send_upstream(self) -> bool:
        """To the next target, if there is one."""
        now = self._services.now()
        if not self._route.advance(now):
            return False
        self._patience.quiet_since = now
        self._relay = self._new_relay()
        self._relay.connect()
        return True

    def _new_relay(self) -> Relay:
        settings = self._services.settings
        return Relay(self, self._route.stop, self._head, settings, self._patience)

    def relay_ready(self, connection: UpstreamConnection) -> None:
        self._timing.upstream_at = self._patience.quiet_since = self._services.now()
        stop = self._route.stop
        body = request_head.body_for(self._head, stop.model_name)
        connection.send(stop.request_head(_UPSTREAM_PATH, self._request_id, len(body)), body)

    def relay_failed(self, failure: Failure) -> None:
        """Within a stream that has begun it ends there; before, the next target may serve."""
        self._relay.drop()
        self._route.failed(failure, self._services.now())
        self._services.counters.upstream_failed(failure)
        if self._answer.started:
            self._break_off(failure)
            return
        may_help = failure.status >= 500 or failure.status == 429
        if may_help and self._send_upstream():
            return
        self._settle(NOTHING, "void", "provider_failed", failure.status)
        self._answer.failure(failure)
        self._done()

    # [7] Relay: the answer comes in, shown to the scanner, and goes out

    def relay_begins(self) -> None:
        """The target answers as it was asked to."""
        route, hold = self._route, self._hold
        assert hold is not None
        if self._relay.scanner is not None:
            self._relay.scanner.enough = self._bill.enough_output(hold)
        self._timing.first_byte_at = self._services.now()
        route.recovered(self._timing.first_byte_at)
        self._answer.served = route.stop.target.model.encode()
        if route.stop.depth:
            first = route.model.targets[0].model.encode()
            self._answer.extra = b"%bx-fallback-from: %b\r\n" % (hold.rate_headers, first)

    def relay_block(self, block: bytes, scanner: StreamScanner) -> None:
        self._services.journal.progress(
            self._slot, scanner.counted_bytes, scanner.events, scanner.envelope
        )
        self._answer.stream(block)

    # [8] and [9] The end: what it cost, said and settled

    def relay_whole(self, body: bytes, usage: TokenUsage | None) -> None:
        assert self._hold is not None
        tokens, settlement = self._bill.of_answer(body, usage)
        self._answer.plain(body, self._bill.charge(tokens, self._hold))
        self._settle(tokens, settlement, "completed")
        self._done()

    def relay_done(self, scanner: StreamScanner) -> None:
        assert self._hold is not None
        tokens, settlement = self._bill.of_stream(scanner)
        self._answer.end_stream(self._tail(scanner, tokens))
        self._settle(tokens, settlement, "completed")
        self._relay.release()
        self._done()

    def relay_outran(self, scanner: StreamScanner) -> None:
        """More has come than the hold can pay: it ends here, as an answer does at its ceiling."""
        self._relay.drop()
        tokens, settlement = self._bill.of_stream(scanner)
        last = replies.length_chunk(scanner, self._head.n or 1)
        self._answer.end_stream(last + self._tail(scanner, tokens))
        self._settle(tokens, settlement, "cut")
        self._done()

    def _tail(self, scanner: StreamScanner, tokens: TokenUsage) -> bytes:
        """What ends a stream: its price, as the client can bear it, and `[DONE]`."""
        assert self._hold is not None
        charge = self._bill.charge(tokens, self._hold)
        quiet = self._request.head.headers.get(b"x-tollgate-credits-chunk", b"").lower() == b"off"
        if quiet and not self._head.wants_usage:
            return replies.credits_comment(charge) + replies.DONE
        return replies.final_chunk(scanner, tokens, charge) + replies.DONE

    def _break_off(self, failure: Failure, outcome: str = "provider_failed") -> None:
        """Within a stream that has begun: an in-band error, and a bill for what was relayed."""
        scanner = self._relay.scanner
        assert scanner is not None and self._hold is not None
        tokens, settlement = self._bill.of_stream(scanner)
        charge = self._bill.charge(tokens, self._hold)
        self._answer.end_stream(replies.error_event(scanner, tokens, charge, failure))
        self._settle(tokens, settlement, outcome, failure.status)
        self._done()

    def client_left(self) -> None:
        """The client is gone: cut the provider at once, settle what was relayed."""
        if self._ended:
            return
        self._ended = True
        self._services.exchanges.discard(self)
        if self._hold is None:
            return  # still being admitted: `_admitted` settles what that brings
        self._relay.drop()
        if self._answer.started and self._relay.scanner is not None:
            self._settle(*self._bill.of_stream(self._relay.scanner), "client_left")
        else:
            self._settle(NOTHING, "void", "client_left")

    def cut(self, failure: Failure) -> None:
        """Our own decision to end this exchange: time is up, or the worker must stop."""
        if self._ended:
            return
        if self._hold is not None:
            self._relay.drop()
        if self._answer.started:
            self._break_off(failure, "cut")
            return
        if self._hold is not None:
            self._settle(NOTHING, "void", "cut", failure.status)
        self._answer.failure(failure)
        self._done()

    def _settle(self, tokens: TokenUsage, settlement: str, outcome: str, status: int = 200) -> None:
        """The one exit of every hold."""
        hold, services = self._hold, self._services
        assert hold is not None
        now = services.now()
        self._hold = None
        if outcome == "completed":
            self._route.succeeded(now)
        else:
            self._route.forgone()
        stop, relayed = self._route.stop, self._relay.answer_bytes
        event = self._bill.event(hold, tokens, settlement, outcome, status, stop, relayed, now)
        settle = self._bill.settle(hold, event)
        services.journal.settle(self._slot, encode_settle(settle))
        services.settlement.submit(self._lease.shard, settle, self._slot, self._lease)
        services.counters.settled(event)
        self._relay.let_go()

    def _done(self) -> None:
        self._ended = True
        self._services.exchanges.discard(self)
        self._answer.done()

    def make_last(self) -> None:
        """Its connection is to close: the answer says so, unless it has begun."""
        self._answer.make_last()

    # Pace and time

    def pause(self) -> None:
        """The client reads too slowly: so does the provider, from now on."""
        self._patience.paused = True
        if self._hold is not None:
            self._relay.pause()

    def resume(self) -> None:
        self._patience.paused = False
        self._patience.heard = True
        if self._hold is not None:
            self._relay.resume()

    def check_time(self, now: float) -> None:
        """Called about twice a second: end what has been silent or has lasted too long."""
        if self._ended or self._hold is None:
            return
        settings, provider = self._services.settings, self._route.stop.target.provider
        if self._patience.exhausted(now, settings, provider):
            self.cut(ProviderTimeout("The answer took longer than is allowed in total."))
        elif self._patience.silent(now, settings, provider, self._relay.status != 0):
            self.relay_failed(Unavailable() if self._relay.waiting else ProviderTimeout())
