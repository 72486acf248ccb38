"""`python -m benchmarks micro`: the hot steps of one request, one by one, in µs of CPU.

Owns a typical request and, for each step, the call that the proxy makes with it. Nothing
here waits or talks to anybody: what a step hands to Redis or to a socket goes nowhere. A step
that became dear shows here by its name, while the scenarios show what all of them cost.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import statistics
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import hiredis
import msgspec

from accounting.contract import catalogue, keyspace
from accounting.contract.catalogue import Model
from accounting.contract.figures import pack_figures
from accounting.contract.identifiers import new_id
from accounting.contract.keyspace import KeyRecord
from accounting.contract.pricing import cost_ucr
from accounting.contract.settings import Settings
from accounting.contract.usage_event import TokenUsage, UsageEvent, encode_event
from benchmarks.measures import Subject
from benchmarks.micro_upstream import NoPool, Reader, upstream_calls
from benchmarks.product import CATALOGUE, MODEL
from benchmarks.provider.answers import Ask as StandInAsk
from benchmarks.provider.answers import ChunkWriter
from benchmarks.provider.framing import sse
from benchmarks.provider.script import Script
from benchmarks.scenarios import EVENT_CONTENT_BYTES, target
from proxy import replies, request_head
from proxy.admission import Hold
from proxy.answer import Answer
from proxy.bill import Bill, Timing
from proxy.cooldown import Cooldown, CooldownRules
from proxy.http_head import Head, Request, parse_head
from proxy.journal import Journal
from proxy.key_lease import Ask
from proxy.keys import Keys, digest_of
from proxy.leases import Leases
from proxy.request_reader import RequestReader
from proxy.routing import Stop
from proxy.settlement import batch_command
from proxy.usage_scanner import StreamScanner

BATCH = 64
PLENTY = 1 << 60
ANSWER_BYTES = 700


class Step(NamedTuple):
    """A step: its name, the call, and how many of it one call does."""

    name: str
    call: Callable[[], object]
    each: int = 1


class Timed(msgspec.Struct, frozen=True):
    """A step's cost: the least of the repeats in µs of CPU, and their median."""

    name: str
    least_us: float
    median_us: float


class NoPipe:
    """Stands where the connection to Redis is: keeps the last reply handler, sends nothing."""

    def __init__(self) -> None:
        self.on_reply: Callable[[object], None] = lambda reply: None

    def send(self, packed: bytes, on_reply: Callable[[object], None]) -> None:
        """Nothing is sent."""
        self.on_reply = on_reply


class NoClient:
    """Stands where the client's connection is."""

    def write(self, data: bytes) -> None:
        """Nothing is written."""

    def write_now(self, data: bytes) -> None:
        """Nothing is written."""

    def exchange_done(self, close: bool) -> None:
        """Nobody waits."""


class Typical:
    """The request of the scenarios and what the proxy knows when it comes to each step."""

    def __init__(self) -> None:
        self.secret = b"inf_" + secrets.token_urlsafe(32).encode()
        self.record = KeyRecord(1, new_id("key"), new_id("ws"), "load", [], [])
        text = CATALOGUE.format(provider_url="http://127.0.0.1:1/v1", model=MODEL)
        self.model: Model = catalogue.parse(text, {}, sandbox=True).models[MODEL]
        self.stop = Stop(self.model, 0, NoPool(), Cooldown(CooldownRules(30, 5, 0.5, 5, 60), print))
        subject = Subject("micro", "http://127.0.0.1:1/v1", self.secret.decode(), MODEL)
        self.request = target(subject).request
        head, _, self.body = self.request.partition(b"\r\n\r\n")
        self.http_head = head + b"\r\n\r\n"
        self.head = request_head.parse(self.body)
        self.timing = Timing(1.0, 1_700_000_000_000_000)
        self.tokens = TokenUsage(input=256, output=47)
        self.bill = self.make_bill()
        self.hold = Hold(self.bill.credits_ucr, self.bill.tokens, 1_700_000_000_000_000, b"")
        self.event = self.make_event()
        self.settle = self.bill.settle(self.hold, self.event)

    def make_bill(self) -> Bill:
        """The bounds of the request and the worst it can cost."""
        request_id = b"req_01JD00000000000000000000AA"
        return Bill(request_id, self.record, self.head, self.model, self.body, self.timing)

    def make_event(self) -> UsageEvent:
        """The record of the exchange."""
        return self.bill.event(
            self.hold, self.tokens, "exact", "completed", 200, self.stop, ANSWER_BYTES, 1.1
        )


@contextlib.contextmanager
def steps(folder: Path) -> Iterator[list[Step]]:
    """Every step, in the order of a request; needs a running event loop."""
    typical, journal = Typical(), Journal(folder / "micro.journal", 64)
    body = b"{" + b" " * ANSWER_BYTES + b"}"
    with upstream_calls(body, chunk_bytes(usage_null=False), Reader()) as (answer, chunk):
        yield all_steps(typical, journal, answer, chunk)
    journal.close(remove=True)


def all_steps(
    typical: Typical, journal: Journal, answer: Callable[[], None], chunk: Callable[[], None]
) -> list[Step]:
    """The same, once what they need is there."""
    return [
        *reading_steps(typical),
        *key_and_lease_steps(typical, NoPipe()),
        *journal_steps(typical, journal),
        Step("read a provider's plain answer", answer),
        Step("read a provider's chunk", chunk),
        *stream_steps(),
        *settling_steps(typical),
    ]


def reading_steps(typical: Typical) -> list[Step]:
    """From bytes to what is asked, and to the provider's body."""
    settings = Settings()
    repeating = RequestReader(settings)

    def read(reader: RequestReader) -> None:
        reader.feed(typical.request)
        reader.requests.popleft()

    return [
        Step("parse head", lambda: parse_head(typical.http_head)),
        Step("read request (head and body)", lambda: read(RequestReader(settings))),
        Step("read request whose head is known", lambda: read(repeating)),
        Step("parse body", lambda: request_head.parse(typical.body)),
        Step("bound tokens and cost", typical.make_bill),
        Step("edit body", lambda: request_head.body_for(typical.head, typical.stop.model_name)),
    ]


def key_and_lease_steps(typical: Typical, pipe: NoPipe) -> list[Step]:
    """Who asks, and may it be served."""
    keys = Keys(pipe, 100, 1e9, time.monotonic)
    authorization = b"Bearer " + typical.secret
    digest = digest_of(authorization)
    keys.look_up(digest, lambda found: None)
    pipe.on_reply(msgspec.msgpack.encode(typical.record))
    leases = Leases(pipe, "micro", time.monotonic)
    ask = Ask(typical.bill.credits_ucr, typical.bill.tokens, 1, 1, lambda outcome: None)
    other = KeyRecord(1, new_id("key"), new_id("ws"), "cold", [], [])
    hot, cold = leases.of(typical.record), leases.of(other)
    hot.version, hot.right_until = 1, float("inf")
    hot.free_requests = hot.free_credits = hot.free_tokens = PLENTY
    hot.requests_per_minute, hot.tokens_per_minute = 60_000_000, 1_000_000_000_000
    now_us = 1_700_000_000_000_000
    rates = (hot.requests_per_minute, hot.tokens_per_minute)
    figures = pack_figures(
        *(now_us, 0, 0, *rates),
        *(0, 0, 0, now_us, now_us),
        *(0, 0, 0, now_us, now_us),
    )
    reply = b"$%d\r\n%s\r\n" % (len(figures), figures)

    def call() -> None:
        cold.calling = False
        leases.admit(other, ask)

    def call_and_reply() -> None:
        call()
        parser = hiredis.Reader()
        parser.feed(reply)
        pipe.on_reply(parser.gets())

    return [
        Step("key: digest and look-up", lambda: keys.find(authorization, lambda found: None)),
        Step("key: look-up", lambda: keys.look_up(digest, lambda found: None)),
        Step("lease: admit locally", lambda: leases.admit(typical.record, ask)),
        Step("lease: encode a call", call),
        Step("lease: encode a call, decode its reply", call_and_reply),
    ]


def journal_steps(typical: Typical, journal: Journal) -> list[Step]:
    """What a crash would leave."""
    opening = typical.bill.opening(typical.hold, typical.stop)
    settle = msgspec.msgpack.encode(typical.settle)

    def open_and_free() -> None:
        slot = journal.reserve()
        journal.open(slot, opening)
        journal.free(slot)

    def whole() -> None:
        slot = journal.reserve()
        journal.open(slot, typical.bill.opening(typical.hold, typical.stop))
        journal.settle(slot, settle)
        journal.batched(slot, 1)
        journal.free(slot)

    return [
        Step("journal: open and free a slot", open_and_free),
        Step("journal: opening made, open, settle, free", whole),
    ]


def stream_steps() -> list[Step]:
    """One chunk on its way."""
    chunk, with_null = chunk_bytes(usage_null=False), chunk_bytes(usage_null=True)
    plain, stripping = (StreamScanner(1 << 20, strip_nulls=True) for _ in range(2))
    answer = Answer(NoClient(), Request(Head()), b"req_01JD00000000000000000000AA")
    answer.started = True
    return [
        Step("scan chunk", lambda: plain.pass_on(chunk)),
        Step("scan chunk with usage:null", lambda: stripping.pass_on(with_null)),
        Step("frame chunk", lambda: answer.stream(chunk)),
    ]


def chunk_bytes(usage_null: bool) -> bytes:
    """A content event of the stand-in: of providers that say `"usage":null`, or of others."""
    script = Script(chunk_bytes=EVENT_CONTENT_BYTES, chunks=1)
    ask = StandInAsk("chat", MODEL, script, True, usage_null, 100, 256, 1_700_000_000)
    writer = ChunkWriter(ask, "chatcmpl-std000000000001")
    return sse(script, writer.piece(writer.content.pieces[0], 0))


def settling_steps(typical: Typical) -> list[Step]:
    """From what was used to a charge, its record and the client's head."""
    shard = keyspace.shard_of(typical.record.workspace_id)
    batch = [typical.settle] * BATCH
    price = typical.model.price
    reply = (b"req_01JD00000000000000000000AA", ANSWER_BYTES, 12_345, b"sandbox", b"", False)
    return [
        Step("price", lambda: cost_ucr(price, typical.tokens)),
        Step("make usage event", typical.make_event),
        Step("encode usage event", lambda: encode_event(typical.event)),
        Step(
            f"encode settle (one of {BATCH})",
            lambda: batch_command(shard, "micro", 1, batch),
            BATCH,
        ),
        Step("reply head", lambda: replies.plain_head(*reply)),
    ]


def timed(step: Step, repeats: int, seconds: float) -> Timed:
    """A step's cost; a call of nothing (0.05 µs) is in it."""
    timer = timeit.Timer(step.call, timer=time.process_time)
    number = 1
    while (spent := timer.timeit(number)) < seconds / 10:
        number *= 4
    number = max(1, int(number * seconds / max(spent, 1e-9)))
    taken = [value / number / step.each * 1e6 for value in timer.repeat(repeats, number)]
    return Timed(step.name, round(min(taken), 3), round(statistics.median(taken), 3))


async def run(repeats: int = 7, seconds: float = 0.03) -> list[Timed]:
    """Time every step, `repeats` times about `seconds` each."""
    assert asyncio.get_running_loop()
    with (
        tempfile.TemporaryDirectory(prefix="benchmark-micro-") as folder,
        steps(Path(folder)) as found,
    ):
        return [timed(step, repeats, seconds) for step in found]


def table(found: list[Timed]) -> str:
    """The steps as a Markdown table."""
    lines = ["| step | µs, least | median |", "| --- | --- | --- |"]
    lines += [f"| {one.name} | {one.least_us:.2f} | {one.median_us:.2f} |" for one in found]
    return "\n".join(lines)
