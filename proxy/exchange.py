"""One request and its answer, told top to bottom; the only file that sees all the steps.

Theory of operation: an exchange is a small state machine driven by callbacks, no task of its
own. `begin` runs as far as it can; each later step is called by whoever finished the step
before. Obligations: once `_hold` is set, exactly one `_settle` follows, on whichever path
the exchange ends; the client gets exactly one answer, or a cut connection; the upstream
connection is either read to the end of its answer or abandoned.
"""

import time
from typing import TYPE_CHECKING, Protocol

from accounting.contract.catalogue import Model, Target
from accounting.contract.errors import (
    Failure,
    ProviderFailed,
    ProviderGarbled,
    ProviderTimeout,
    ProviderUnreachable,
    Unavailable,
)
from accounting.contract.keyspace import KeyRecord
from accounting.contract.pricing import cost_ucr, worst_case_ucr
from accounting.contract.usage_event import SCHEMA, TokenUsage, UsageEvent, encode_event
from proxy import replies, request_head
from proxy.admission import Hold
from proxy.journal import JournalFull
from proxy.leases import Ask, KeyLease, Stale
from proxy.provider_errors import failure_of, scrubbed
from proxy.replay import Opening, encode_opening
from proxy.request_head import ChatHead
from proxy.settlement import Settle, encode_settle
from proxy.sse import EventTooLong
from proxy.upstream import UpstreamConnection
from proxy.usage_scanner import StreamScanner, estimate_input, read_answer

if TYPE_CHECKING:
    from proxy.services import Services

ROUTE = "/v1/chat/completions"
_UPSTREAM_PATH = "/chat/completions"
_STALE_TRIES = 3
_ERROR_BODY_LIMIT = 65_536
_NOTHING = TokenUsage()


class Request(Protocol):
    """What the front door read of a request."""

    headers: dict[bytes, bytes]
    body: bytes
    keep_alive: bool
    http_1_0: bool


class Client(Protocol):
    """The client's side of the wire, as an exchange sees it."""

    def write(self, data: bytes) -> None: ...
    def exchange_done(self, close: bool) -> None: ...
    def cut(self) -> None: ...


class Exchange:
    """See the module. `services` are the worker's; `client` outlives the exchange."""

    __slots__ = (
        "_answer", "_answer_bytes", "_bounds", "_client", "_connection", "_digest", "_ended",
        "_estimate", "_failed_first", "_first_byte_at", "_head", "_head_sent", "_hold",
        "_lease", "_model", "_paused", "_quiet_since", "_record", "_request", "_request_id",
        "_retried", "_scanner", "_services", "_slot", "_started_at", "_started_us", "_status",
        "_target", "_tries", "_upstream_at", "_waiting_upstream", "heard",
    )  # fmt: skip

    def __init__(self, services: "Services", client: Client, request: Request) -> None:
        self._services = services
        self._client = client
        self._request = request
        self._request_id = services.request_ids.next()
        self._started_at = services.now()
        self._started_us = time.time_ns() // 1000
        self._digest: bytes | None = None
        self._record: KeyRecord | None = None
        self._head: ChatHead | None = None
        self._model: Model | None = None
        self._bounds = (0, 0)
        self._estimate = 0
        self._hold: Hold | None = None
        self._lease: KeyLease | None = None
        self._slot = -1
        self._target = 0
        self._tries = 0
        self._failed_first: Failure | None = None
        self._connection: UpstreamConnection | None = None
        self._waiting_upstream = False
        self._retried = False
        self._status = 0
        self._answer: list[bytes] = []
        self._answer_bytes = 0
        self._scanner: StreamScanner | None = None
        self._head_sent = False
        self._paused = False
        self._ended = False
        self._upstream_at = 0.0
        self._first_byte_at = 0.0
        self._quiet_since = self._started_at
        self.heard = False

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
        self._record = found
        try:
            self._plan(found)
        except Failure as failure:
            self._refuse(failure)

    def _plan(self, record: KeyRecord) -> None:
        body = self._request.body
        head = self._head = request_head.parse(body)
        model = self._model = self._services.routing.model(head.model)
        input_bound = request_head.input_bound(body, model.context_tokens)
        output_bound = request_head.output_bound(head, model.max_output_tokens)
        self._bounds = (input_bound, output_bound)
        self._estimate = min(estimate_input(len(body)), input_bound)
        audio = head.wants_audio or b'"input_audio"' in body
        credits_ucr = worst_case_ucr(model.price, input_bound, output_bound, audio)
        allowed = not record.allowed_models or model.name in record.allowed_models
        self._admit(record, credits_ucr, input_bound + output_bound, allowed)

    # [5] Admission: every limit at once

    def _admit(self, record: KeyRecord, credits_ucr: int, tokens: int, allowed: bool) -> None:
        services = self._services
        if services.draining:
            raise Unavailable()
        try:
            self._slot = services.journal.reserve()
        except JournalFull:
            raise Unavailable("Too much is waiting to be settled.") from None
        ask = Ask(credits_ucr, tokens, int(allowed), record.version, self._admitted)
        self._lease = services.leases.admit(record, ask)

    def _admitted(self, outcome: Hold | Failure | Stale) -> None:
        if not isinstance(outcome, Hold):
            self._services.journal.free(self._slot)
            if self._ended:
                return
            if isinstance(outcome, Stale):
                self._read_key_again()
            else:
                self._refuse(outcome)
        else:
            self._hold = outcome
            self._services.journal.open(self._slot, encode_opening(self._opening(outcome)))
            if self._ended:  # the client left while the answer of Redis was on its way
                self._settle(_NOTHING, "void", "client_left")
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
        self._answer_failure(failure)

    # [6] Upstream: the target in turn, while no byte has gone to the client

    def _send_upstream(self, fresh: bool = False) -> None:
        self._waiting_upstream = True
        self._quiet_since = self._services.now()
        pool = self._services.upstreams.pool(self._serving.provider)
        pool.acquire(self, fresh)

    @property
    def _serving(self) -> Target:
        assert self._model is not None
        return self._model.targets[self._target]

    def upstream_ready(self, connection: UpstreamConnection) -> None:
        assert self._head is not None
        self._waiting_upstream = False
        if self._ended:
            connection.abandon()
            return
        self._connection = connection
        self._upstream_at = self._quiet_since = self._services.now()
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
        """Try the next target; with none left, answer with the first failure and void."""
        assert self._model is not None
        self._drop_upstream()
        self._services.counters.upstream_failed(failure)
        self._failed_first = self._failed_first or failure
        if self._may_fall_back(failure) and self._target + 1 < len(self._model.targets):
            self._target += 1
            self._answer.clear()
            self._scanner = None
            self._status = 0
            self._retried = False
            self._send_upstream()
            return
        self._settle(_NOTHING, "void", "provider_failed", failure.status)
        self._answer_failure(failure)

    def _may_fall_back(self, failure: Failure) -> bool:
        return not self._head_sent and (failure.status >= 500 or failure.status == 429)

    def _drop_upstream(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abandon()

    # [7] Relay: the answer comes in, shown to the scanner, and goes out

    def upstream_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        assert self._head is not None
        self._status = status
        self._first_byte_at = self._services.now()
        if status != 200:
            self._answer.append(headers.get(b"retry-after", b""))
            return
        kind = headers.get(b"content-type", b"").lower()
        if b"content-encoding" in headers and headers[b"content-encoding"] != b"identity":
            self._target_failed(ProviderGarbled())
        elif self._head.stream:
            if not kind.startswith(b"text/event-stream"):
                self._target_failed(ProviderGarbled())
                return
            limit = self._services.settings.event_limit_bytes
            self._scanner = StreamScanner(limit, strip_nulls=not self._head.wants_usage)

    def upstream_body(self, data: bytes) -> None:
        self.heard = True
        if self._scanner is not None:
            self._relay(self._scanner, data)
            return
        self._answer.append(data)
        self._answer_bytes += len(data)
        limit = self._services.settings.answer_limit_bytes
        if self._answer_bytes > (limit if self._status == 200 else _ERROR_BODY_LIMIT):
            self._target_failed(ProviderGarbled("The provider's answer is too large."))

    def _relay(self, scanner: StreamScanner, data: bytes) -> None:
        try:
            block = scanner.pass_on(data)
        except EventTooLong:
            self._break_stream(ProviderGarbled("An event of the provider is too large."))
            return
        if block:
            self._services.journal.progress(
                self._slot, scanner.relayed_bytes, scanner.blocks, scanner.first_length
            )
            self._write_stream(block)
        if scanner.failed is not None:
            self._break_stream(ProviderFailed(scrubbed(scanner.failed, self._serving.provider)))
        elif scanner.done:
            self._finish_stream(scanner)

    def upstream_end(self) -> None:
        """The provider's answer has ended cleanly, or by closing as announced."""
        self._connection = None
        if self._status != 200:
            retry_after, *body = self._answer
            failure = failure_of(self._status, b"".join(body), retry_after, self._serving)
            self._target_failed(failure)
        elif self._scanner is None:
            self._finish_plain(b"".join(self._answer))
        elif self._scanner.finished:
            self._finish_stream(self._scanner)
        else:
            self._break_stream(ProviderFailed("The provider ended its answer early."))

    def upstream_lost(self, garbled: bool) -> None:
        """The connection broke, or what came was not HTTP."""
        connection, self._connection = self._connection, None
        unseen = connection is not None and connection.reused and not connection.heard
        if unseen and not self._retried:  # it had been closed; nothing was answered
            self._retried = True
            self._send_upstream(fresh=True)
            return
        failure = ProviderGarbled() if garbled else ProviderUnreachable()
        if self._scanner is None:
            self._target_failed(failure)
        elif self._scanner.finished:
            self._finish_stream(self._scanner)
        else:
            self._break_stream(failure)

    # [8] and [9] The end: what it cost, said and settled

    def _finish_plain(self, body: bytes) -> None:
        tokens, is_json = read_answer(body)
        if not is_json:
            self._target_failed(ProviderGarbled())
            return
        settlement = "exact"
        if tokens is None:
            settlement = "estimated"
            output = min(estimate_input(len(body)), self._bounds[1])
            tokens = TokenUsage(input=self._estimate, output=output)
        charge = self._charge(tokens)
        head = replies.plain_head(
            self._request_id,
            len(body),
            charge,
            self._served_name,
            self._extra_lines,
            self._closing,
        )
        self._first_byte_at = self._first_byte_at or self._services.now()
        self._client.write(head + body)
        self._settle(tokens, settlement, "completed")
        self._done(self._closing)

    def _finish_stream(self, scanner: StreamScanner) -> None:
        assert self._head is not None
        tokens, settlement = self._measured(scanner)
        charge = self._charge(tokens)
        credits_chunk = self._request.headers.get(b"x-tollgate-credits-chunk", b"").lower()
        if credits_chunk == b"off" and not self._head.wants_usage:
            tail = replies.credits_comment(charge)
        else:
            tail = replies.final_chunk(scanner, tokens, charge)
        self._write_stream(tail + replies.DONE)
        self._settle(tokens, settlement, "completed")
        self._end_stream()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.release()

    def _break_stream(self, failure: Failure) -> None:
        """The provider failed within a stream: in-band error, bill for what was relayed."""
        scanner = self._scanner
        assert scanner is not None
        if not self._head_sent:
            self._target_failed(failure)
            return
        self._drop_upstream()
        self._services.counters.upstream_failed(failure)
        tokens, settlement = self._measured(scanner)
        charge = self._charge(tokens)
        self._write_stream(replies.error_event(scanner, tokens, charge, failure))
        self._settle(tokens, settlement, "provider_failed", failure.status)
        self._end_stream()

    def client_left(self) -> None:
        """The client is gone: cut the provider at once, settle what was relayed."""
        if self._ended:
            return
        self._leave("client_left")
        self._services.exchanges.discard(self)

    def cut(self, failure: Failure) -> None:
        """Our own decision to end this exchange: time is up, or the worker must stop."""
        if self._ended:
            return
        if self._scanner is not None and self._head_sent:
            self._break_stream(failure)
        elif self._hold is not None:
            self._drop_everything()
            self._settle(_NOTHING, "void", "cut", failure.status)
            self._answer_failure(failure)
        else:
            self._ended = True
            self._answer_failure(failure)

    def _leave(self, outcome: str) -> None:
        self._ended = True
        self._drop_everything()
        if self._hold is None:
            return  # still being admitted: `_admitted` settles what it brings
        if self._scanner is not None and self._scanner.blocks:
            self._settle(*self._measured(self._scanner), outcome)
        else:
            self._settle(_NOTHING, "void", outcome)

    def _drop_everything(self) -> None:
        if self._waiting_upstream:
            self._waiting_upstream = False
            self._services.upstreams.pool(self._serving.provider).forget(self)
        self._drop_upstream()

    def _measured(self, scanner: StreamScanner) -> tuple[TokenUsage, str]:
        """Tokens of a stream so far: the provider's figure, else an estimate in bounds."""
        if scanner.usage is not None:
            return scanner.usage, "exact"
        output = min(scanner.estimate_output(), self._bounds[1])
        return TokenUsage(input=self._estimate, output=output), "estimated"

    def _charge(self, tokens: TokenUsage) -> int:
        """What the client pays: the exact cost, never more than was held."""
        assert self._model is not None and self._hold is not None
        return min(cost_ucr(self._model.price, tokens), self._hold.credits_ucr)

    def _settle(self, tokens: TokenUsage, settlement: str, outcome: str, status: int = 200) -> None:
        """The one exit of every hold."""
        hold, lease, record = self._hold, self._lease, self._record
        assert hold is not None and lease is not None and record is not None
        self._hold = None
        event = self._event(hold, tokens, settlement, outcome, status)
        void = settlement == "void"
        lease.drop(hold.credits_ucr, hold.tokens)
        settle = Settle(
            record.workspace_id,
            record.key_id,
            hold.credits_ucr,
            event.charge_ucr,
            hold.tokens,
            tokens.input + tokens.output,
            hold.admitted_at_us if void else 0,
            encode_event(event),
        )
        self._services.journal.settle(self._slot, encode_settle(settle))
        self._services.settlement.submit(lease.shard, settle, self._slot)
        self._services.counters.settled(event)

    def _event(
        self, hold: Hold, tokens: TokenUsage, settlement: str, outcome: str, status: int
    ) -> UsageEvent:
        assert self._model is not None and self._record is not None and self._head is not None
        cost = cost_ucr(self._model.price, tokens)
        charge = min(cost, hold.credits_ucr)
        now = self._services.now()
        relayed = self._scanner.relayed_bytes if self._scanner is not None else self._answer_bytes
        return UsageEvent(
            SCHEMA,
            self._request_id.decode(),
            self._record.workspace_id,
            self._record.key_id,
            ROUTE,
            self._model.name,
            str(self._serving),
            self._model.price.version,
            self._started_us,
            charge,
            hold.credits_ucr,
            cost - charge,
            settlement,
            outcome,
            status,
            bool(self._head.stream),
            self._target,
            tokens,
            _us(now - self._started_at),
            _us(now - self._upstream_at) if self._upstream_at else 0,
            _us(self._first_byte_at - self._started_at) if self._first_byte_at else 0,
            len(self._request.body),
            relayed,
        )

    def _opening(self, hold: Hold) -> Opening:
        assert self._model is not None
        event = self._event(hold, _NOTHING, "void", "cut", 0)
        return Opening(
            event,
            self._model.price,
            hold.tokens,
            self._bounds[0],
            self._bounds[1],
            self._estimate,
            hold.admitted_at_us,
        )

    # Writing to the client

    @property
    def _closing(self) -> bool:
        return not self._request.keep_alive

    @property
    def _served_name(self) -> bytes:
        return self._serving.model.encode()

    @property
    def _extra_lines(self) -> bytes:
        lines = self._hold.rate_headers if self._hold is not None else b""
        if self._target and self._model is not None:
            lines += b"x-fallback-from: %b\r\n" % self._model.targets[0].model.encode()
        return lines

    def _write_stream(self, data: bytes) -> None:
        chunked = not self._request.http_1_0
        framed = b"%x\r\n%b\r\n" % (len(data), data) if chunked else data
        if not self._head_sent:
            self._head_sent = True
            head = replies.stream_head(
                self._request_id,
                self._served_name,
                self._extra_lines,
                chunked,
                self._closing or not chunked,
            )
            framed = head + framed
        self._client.write(framed)

    def _end_stream(self) -> None:
        if not self._request.http_1_0:
            self._client.write(replies.LAST_CHUNK)
        self._done(self._closing or self._request.http_1_0)

    def _answer_failure(self, failure: Failure) -> None:
        extra = self._extra_lines if self._hold is not None else b""
        self._client.write(
            replies.error_reply(failure, self._request_id.decode(), self._closing, extra)
        )
        self._done(self._closing)

    def _done(self, close: bool) -> None:
        self._ended = True
        self._services.exchanges.discard(self)
        self._client.exchange_done(close)

    # Pace and time

    def pause(self) -> None:
        """The client reads too slowly: so does the provider, from now on."""
        self._paused = True
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        self._paused = False
        self._quiet_since = self._services.now()
        if self._connection is not None:
            self._connection.resume()

    def check_time(self, now: float) -> None:
        """Called about twice a second: end what has been silent or has lasted too long."""
        if self._ended or self._hold is None:
            return
        settings, provider = self._services.settings, self._serving.provider
        total = provider.total_timeout_seconds or settings.total_timeout_seconds
        if now - self._started_at > total:
            self.cut(ProviderTimeout("The answer took longer than is allowed in total."))
            return
        if self.heard:
            self.heard = False
            self._quiet_since = now
        if self._paused or self._waiting_upstream:
            return
        silence = (
            provider.chunk_timeout_seconds or settings.chunk_timeout_seconds
            if self._status
            else provider.first_byte_timeout_seconds or settings.first_byte_timeout_seconds
        )
        if now - self._quiet_since > silence:
            self._timed_out()

    def _timed_out(self) -> None:
        if self._head_sent:
            self.cut(ProviderTimeout("The provider fell silent within its answer."))
        else:
            self._target_failed(ProviderTimeout())


def _us(seconds: float) -> int:
    return max(0, int(seconds * 1_000_000))
