"""[8] What an exchange may cost, did cost, and the record of it: figures, no I/O.

Owns the bounds of one request and turns them, and what was used, into the hold, the charge,
the usage event and the journal's opening.
"""

import msgspec

from accounting.contract.catalogue import Model
from accounting.contract.keyspace import KeyRecord
from accounting.contract.pricing import MILLION, Price, cost_ucr, worst_case_ucr
from accounting.contract.usage_event import SCHEMA, TokenUsage, UsageEvent, encode_event
from proxy.admission import Hold
from proxy.chat_head import ChatHead
from proxy.provider_usage import estimate_input
from proxy.request_head import has_audio, input_bound, output_bound
from proxy.routing import Stop
from proxy.settle_record import Settle
from proxy.usage_scanner import UNBOUNDED, StreamScanner

ROUTE = "/v1/chat/completions"
NOTHING = TokenUsage()
_MARGIN_TOKENS = 64
_pack = msgspec.msgpack.Encoder().encode


class Timing:
    """When things happened, in seconds of the worker's clock; 0 = did not happen."""

    __slots__ = ("first_byte_at", "started_at", "started_us", "upstream_at")

    def __init__(self, started_at: float, started_us: int) -> None:
        self.started_at = started_at
        self.started_us = started_us
        self.upstream_at = 0.0
        self.first_byte_at = 0.0


class Bill:
    """One exchange's figures. Token bounds are upper bounds; µcr are whole."""

    __slots__ = (
        "_body_length", "_cost", "_estimate", "_head", "_model", "_record", "_request_id",
        "_timing", "credits_ucr", "input_bound", "output_bound",
    )  # fmt: skip

    def __init__(
        self,
        request_id: bytes,
        record: KeyRecord,
        head: ChatHead,
        model: Model,
        body: bytes,
        timing: Timing,
    ) -> None:
        self._request_id = request_id
        self._record = record
        self._head = head
        self._model = model
        self._timing = timing
        self._cost: tuple[TokenUsage, int] = NOTHING, 0
        self._body_length = len(body)
        self.input_bound = input_bound(body, head, model.context_tokens)
        self.output_bound = output_bound(head, model.max_output_tokens)
        self._estimate = min(estimate_input(len(body)), self.input_bound)
        audio = _prices_sound(model.price) and (head.wants_audio or has_audio(body))
        self.credits_ucr = worst_case_ucr(model.price, self.input_bound, self.output_bound, audio)

    @property
    def tokens(self) -> int:
        """Tokens to hold."""
        return self.input_bound + self.output_bound

    def charge(self, tokens: TokenUsage, hold: Hold) -> int:
        """What the client pays, µcr: the exact cost, never more than was held."""
        return min(self._cost_of(tokens), hold.credits_ucr)

    def _cost_of(self, tokens: TokenUsage) -> int:
        """Said to the client, then recorded: worked out once."""
        known, cost = self._cost
        if known is not tokens:
            cost = cost_ucr(self._model.price, tokens)
            self._cost = tokens, cost
        return cost

    def enough_output(self, hold: Hold) -> int:
        """Output tokens that the hold certainly cannot pay, had the input cost nothing. They
        are counted by an estimate, hence the margin."""
        rates = self._model.price.long or self._model.price.base
        rate = min(rates.output, self._model.price.base.output)
        if not rate:
            return UNBOUNDED
        paid = hold.credits_ucr * MILLION // rate
        return paid + paid // 4 + _MARGIN_TOKENS

    def of_stream(self, scanner: StreamScanner) -> tuple[TokenUsage, str]:
        """Tokens of a stream so far: the provider's figure, else an estimate in bounds.

        Comments alone are no answer: a stream without a chunk costs nothing.
        """
        if scanner.usage is not None:
            return scanner.usage, "exact"
        if scanner.chunk_head is None:
            return NOTHING, "void"
        return self._estimated(scanner.estimate_output()), "estimated"

    def of_answer(self, body: bytes, usage: TokenUsage | None) -> tuple[TokenUsage, str]:
        """Tokens of a plain answer: the provider's figure, else an estimate in bounds."""
        if usage is not None:
            return usage, "exact"
        return self._estimated(estimate_input(len(body))), "estimated"

    def _estimated(self, output: int) -> TokenUsage:
        return TokenUsage(input=self._estimate, output=min(output, self.output_bound))

    def event(
        self,
        hold: Hold,
        tokens: TokenUsage,
        settlement: str,
        outcome: str,
        status: int,
        served: Stop,
        answer_bytes: int,
        now: float,
    ) -> UsageEvent:
        """The record of the exchange, ended `now`, served by that target."""
        cost = self._cost_of(tokens)
        charge = min(cost, hold.credits_ucr)
        timing = self._timing
        return UsageEvent(
            SCHEMA,
            self._request_id.decode(),
            self._record.workspace_id,
            self._record.key_id,
            ROUTE,
            self._model.name,
            served.name,
            self._model.price.version,
            timing.started_us,
            charge,
            hold.credits_ucr,
            cost - charge,
            settlement,
            outcome,
            status,
            bool(self._head.stream),
            served.depth,
            tokens,
            int((now - timing.started_at) * 1e6),
            int((now - timing.upstream_at) * 1e6) if timing.upstream_at else 0,
            int((timing.first_byte_at - timing.started_at) * 1e6) if timing.first_byte_at else 0,
            self._body_length,
            answer_bytes,
        )

    def settle(self, hold: Hold, event: UsageEvent) -> Settle:
        """What ends `hold`, with its event."""
        return Settle(
            event.workspace_id,
            event.key_id,
            hold.credits_ucr,
            event.charge_ucr,
            hold.tokens,
            event.tokens.input + event.tokens.output,
            hold.admitted_at_us if event.settlement == "void" else 0,
            encode_event(event),
        )

    def opening(self, hold: Hold, first: Stop) -> bytes:
        """What the journal keeps from admission on, should this worker die: a packed
        `replay.Opening`. Packed from tuples, without its objects: 1.1 µs cheaper."""
        record, model, timing = self._record, self._model, self._timing
        event = (
            *(SCHEMA, self._request_id.decode(), record.workspace_id, record.key_id, ROUTE),
            *(model.name, first.name, model.price.version, timing.started_us),
            *(0, hold.credits_ucr, 0, "void", "cut", 0, bool(self._head.stream), 0, NOTHING),
            *(0, 0, 0, self._body_length, 0),
        )
        bounds = (self.input_bound, self.output_bound, self._estimate)
        return _pack((event, first.packed_price, hold.tokens, *bounds, hold.admitted_at_us))


def _prices_sound(price: Price) -> bool:
    """Whether sound costs more than text: if not, it is not looked for."""
    base, long = price.base, price.long
    if base.audio_input > base.input or base.audio_output > base.output:
        return True
    return long is not None and (long.audio_input > long.input or long.audio_output > long.output)
