"""One request and its answer, told top to bottom; the only file that sees all the steps.

Theory of operation: an exchange is a small state machine driven by callbacks, no task of its
own. `begin` runs as far as it can; each later step is called by whoever finished the step
before. Obligations: once `_hold` is set, exactly one `_settle` follows, on whichever path
the exchange ends; the client gets exactly one answer, or has left; the upstream connection
is released after its answer or abandoned within it.
"""

import time
from typing import TYPE_CHECKING

from accounting.contract.catalogue import Model, Target
from accounting.contract.errors import (
    Failure,
    ProviderBrokeOff,
    ProviderFailed,
    ProviderGarbled,
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
from proxy.journal import JournalFull
from proxy.leases import Ask, KeyLease, Stale
from proxy.patience import Patience
from proxy.relay import Relay
from proxy.replay import encode_opening
from proxy.request_head import ChatHead
from proxy.settlement import encode_settle
from proxy.upstream import UpstreamConnection
from proxy.usage_scanner import StreamScanner, read_answer

if TYPE_CHECKING:
    from proxy.services import Services

_UPSTREAM_PATH = "/chat/completions"
_STALE_TRIES = 3


class Exchange:
    """See the module. `services` are the worker's; the client outlives the exchange."""

    __slots__ = (
        "_answer", "_bill", "_connection", "_digest", "_ended", "_head", "_hold", "_lease",
        "_model", "_patience", "_relay", "_request", "_request_id", "_retried", "_services",
        "_slot", "_target", "_timing", "_tries", "_waiting_upstream",
    )  # fmt: skip

    _head: ChatHead
    _model: Model
    _bill: Bill
    _lease: KeyLease
    _relay: Relay

    def __init__(self, services: "Services", client: Client, request: Request) -> None:
        self._services = services
        self._request = request
        self._request_id = services.request_ids.next()
        self._timing = Timing(services.now(), time.time_ns() // 1000)
        self._answer = Answer(client, request, self._request_id)
        self._digest: bytes | None = None
        self._hold: Hold | None = None
        self._slot = 0
        self._target = 0
        self._tries = 0
        self._connection: UpstreamConnection | None = None
        self._waiting_upstream = False
        self._retried = False
        self._ended = False
        self._patience = Patience(self._timing.started_at)

    def __repr__(self) -> str:
        return f"Exchange({self._request_id.decode()}, target={self._target}, ended={self._ended})"

    # [3] The key, then [2] the head, [4] the route, and what it can cost at most

    def begin(self) -> None:
        self._services.exchanges.add(self)
        authorization = self._request.headers.get(b"authorization")
        self._digest = self._services.keys.find(authorization, self._key_found)

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
        model = services.routing.model(head.model)
        self._head, self._model = head, model
        self._bill = Bill(self._request_id, record, head, model, body, self._timing)
        if record.scopes and INFERENCE not in record.scopes:
            raise ScopeMissing
        if not services.admitting:
            raise Unavailable
        try:
            self._slot = services.journal.reserve()
        except JournalFull:
            raise Unavailable("Too much is waiting to be settled.") from None
        allowed = not record.allowed_models or model.name in record.allowed_models
        ask = Ask(
            self._bill.credits_ucr, self._bill.tokens, int(allowed), record.version, self._admitted
        )
        self._lease = services.leases.admit(record, ask)

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
        services.journal.open(
            self._slot, encode_opening(self._bill.opening(outcome, services.now()))
        )
        self._relay = Relay(self._serving)
        if self._ended:  # the client left while the decision was on its way
            self._settle(NOTHING, "void", "client_left")
        else:
            self._send_upstream()

    def _read_key_again(self) -> None:
        self._tries += 1
        if self._tries >= _STALE_TRIES or self._digest is None:
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

    @property
    def _serving(self) -> Target:
        return self._model.targets[self._target]

    def _send_upstream(self, fresh: bool = False) -> None:
        self._waiting_upstream = True
        self._services.upstreams.pool(self._serving.provider).acquire(self, fresh)

    def upstream_ready(self, connection: UpstreamConnection) -> None:
        self._waiting_upstream = False
        if self._ended:
            connection.abandon()
            return
        self._connection = connection
        self._timing.upstream_at = self._patience.quiet_since = self._services.now()
        target = self._serving
        body = request_head.body_for(self._request.body, self._head, target.model)
        head = self._services.routing.request_head(target, _UPSTREAM_PATH)
        connection.send(
            b"%bx-request-id: %b\r\ncontent-length: %d\r\n\r\n"
            % (head, self._request_id, len(body)),
            body,
        )

    def upstream_refused(self, failure: Failure) -> None:
        self._waiting_upstream = False
        if not self._ended:
            self._target_failed(failure)

    def _target_failed(self, failure: Failure) -> None:
        """Nothing has gone to the client: try the next target, or void and say why."""
        self._drop_upstream()
        self._services.counters.upstream_failed(failure)
        may_help = failure.status >= 500 or failure.status == 429
        if may_help and self._target + 1 < len(self._model.targets):
            self._target += 1
            self._retried = False
            self._relay = Relay(self._serving)
            self._send_upstream()
            return
        self._settle(NOTHING, "void", "provider_failed", failure.status)
        self._answer.failure(failure)
        self._done()

    def _drop_upstream(self) -> None:
        if self._waiting_upstream:
            self._waiting_upstream = False
            self._services.upstreams.pool(self._serving.provider).forget(self)
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abandon()

    # [7] Relay: the answer comes in, shown to the scanner, and goes out

    def upstream_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        self._timing.first_byte_at = self._services.now()
        try:
            self._relay.start(status, headers, self._head, self._services.settings)
        except Failure as failure:
            self._target_failed(failure)
            return
        self._answer.served = self._serving.model.encode()
        if self._target and status == 200:
            first = self._model.targets[0].model.encode()
            self._answer.extra += b"x-fallback-from: %b\r\n" % first

    def upstream_body(self, data: bytes) -> None:
        self._patience.heard = True
        relay, scanner = self._relay, self._relay.scanner
        try:
            if scanner is not None:
                self._pass_on(relay.pass_on(scanner, data), scanner)
            else:
                relay.gather(data)
        except Failure as failure:
            self._broken(failure)

    def _pass_on(self, block: bytes, scanner: StreamScanner) -> None:
        if block:
            self._services.journal.progress(
                self._slot, scanner.counted_bytes, scanner.events, scanner.envelope
            )
            self._answer.stream(block)
        if scanner.failed is not None:
            self._broken(self._relay.in_band_failure(scanner.failed))
        elif scanner.done:
            self._finish_stream(scanner)

    def upstream_end(self) -> None:
        """The provider's answer has ended cleanly, or by closing as announced."""
        self._connection = None
        if self._relay.status != 200:
            self._target_failed(self._relay.failure())
        elif self._relay.scanner is None:
            self._finish_plain(self._relay.body)
        else:
            self._finish_unasked(self._relay.scanner)

    def _finish_unasked(self, scanner: StreamScanner) -> None:
        """The stream ended without `[DONE]`: fine after its last chunk, an error before."""
        self._pass_on(scanner.finish(), scanner)
        if self._ended:
            return
        if scanner.finished:
            self._finish_stream(scanner)
        else:
            self._broken(ProviderFailed("The provider ended its answer early."))

    def upstream_lost(self, garbled: bool) -> None:
        """The connection broke, or what came was not HTTP."""
        connection, self._connection = self._connection, None
        unseen = connection is not None and connection.reused and not connection.heard
        if unseen and not self._retried:  # it had been closed; nothing was answered
            self._retried = True
            self._send_upstream(fresh=True)
            return
        scanner = self._relay.scanner
        if scanner is not None and scanner.finished:
            self._finish_stream(scanner)
        else:
            self._broken(ProviderGarbled() if garbled else ProviderBrokeOff())

    # [8] and [9] The end: what it cost, said and settled

    def _finish_plain(self, body: bytes) -> None:
        usage, is_json = read_answer(body)
        if not is_json:
            self._target_failed(ProviderGarbled())
            return
        assert self._hold is not None
        tokens, settlement = self._bill.of_answer(body, usage)
        self._answer.plain(body, self._bill.charge(tokens, self._hold))
        self._settle(tokens, settlement, "completed")
        self._done()

    def _finish_stream(self, scanner: StreamScanner) -> None:
        assert self._hold is not None
        tokens, settlement = self._bill.of_stream(scanner)
        charge = self._bill.charge(tokens, self._hold)
        quiet = self._request.headers.get(b"x-tollgate-credits-chunk", b"").lower() == b"off"
        if quiet and not self._head.wants_usage:
            tail = replies.credits_comment(charge)
        else:
            tail = replies.final_chunk(scanner, tokens, charge)
        self._answer.end_stream(tail + replies.DONE)
        self._settle(tokens, settlement, "completed")
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.release()
        self._done()

    def _broken(self, failure: Failure) -> None:
        """The provider failed within its answer. Within a stream that has begun: an in-band
        error, and a bill for what was relayed."""
        scanner = self._relay.scanner
        if scanner is None or not self._answer.started:
            self._target_failed(failure)
            return
        self._drop_upstream()
        self._services.counters.upstream_failed(failure)
        assert self._hold is not None
        tokens, settlement = self._bill.of_stream(scanner)
        charge = self._bill.charge(tokens, self._hold)
        self._answer.end_stream(replies.error_event(scanner, tokens, charge, failure))
        self._settle(tokens, settlement, "provider_failed", failure.status)
        self._done()

    def client_left(self) -> None:
        """The client is gone: cut the provider at once, settle what was relayed."""
        if self._ended:
            return
        self._ended = True
        self._services.exchanges.discard(self)
        self._drop_upstream()
        if self._hold is None:
            return  # still being admitted: `_admitted` settles what that brings
        scanner = self._relay.scanner
        if self._answer.started and scanner is not None:
            self._settle(*self._bill.of_stream(scanner), "client_left")
        else:
            self._settle(NOTHING, "void", "client_left")

    def cut(self, failure: Failure) -> None:
        """Our own decision to end this exchange: time is up, or the worker must stop."""
        if self._ended:
            return
        if self._answer.started:
            self._broken(failure)
            return
        self._drop_upstream()
        if self._hold is not None:
            self._settle(NOTHING, "void", "cut", failure.status)
        self._answer.failure(failure)
        self._done()

    def _settle(self, tokens: TokenUsage, settlement: str, outcome: str, status: int = 200) -> None:
        """The one exit of every hold."""
        hold, services = self._hold, self._services
        assert hold is not None
        self._hold = None
        served, relayed = (self._serving, self._target), self._relay.answer_bytes
        event = self._bill.event(
            hold, tokens, settlement, outcome, status, served, relayed, services.now()
        )
        settle = self._bill.settle(hold, event)
        services.journal.settle(self._slot, encode_settle(settle))
        services.settlement.submit(self._lease.shard, settle, self._slot, self._lease)
        services.counters.settled(event)

    def _done(self) -> None:
        self._ended = True
        self._services.exchanges.discard(self)
        self._answer.done()

    # Pace and time

    def pause(self) -> None:
        """The client reads too slowly: so does the provider, from now on."""
        self._patience.paused = True
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        self._patience.paused = False
        self._patience.heard = True
        if self._connection is not None:
            self._connection.resume()

    def check_time(self, now: float) -> None:
        """Called about twice a second: end what has been silent or has lasted too long."""
        if self._ended or self._hold is None:
            return
        settings, provider = self._services.settings, self._serving.provider
        if self._patience.exhausted(now, settings, provider):
            self.cut(ProviderTimeout("The answer took longer than is allowed in total."))
        elif self._waiting_upstream:
            return  # the pool has its own time-out for that
        elif self._patience.silent(now, settings, provider, self._relay.status != 0):
            self._broken(ProviderTimeout())
