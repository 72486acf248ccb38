"""Mixed load: plain and streamed requests, clients that leave, faults of providers, slow readers.

Owns asking and noting what was told. What it must be told is judged here only where a single
answer shows it; the rest is `books`'.
"""

import asyncio
import random
import re
import time
from collections import Counter

import httptools
from msgspec import Struct

from accounting.contract.money import parse_credits
from tests.chaos.people import People, Person
from tests.chaos.site import Site
from tests.chaos.wire import Answer, Wire, request

PATH = "/v1/chat/completions"
HANG_SECONDS = 40.0
AGAIN_SECONDS = 0.05
LEAVING, FAULTY, SLOW, HALF = 0.30, 0.05, 0.05, 0.02
CREDITS = re.compile(rb'credits_used"?\s*[:=]\s*([0-9.]+)')
CODE = re.compile(rb'"code":\s*"([^"]+)"')
STREAM_FAULTS = (
    "reset_mid_stream", "eof_mid_stream", "end_mid_stream", "eof_without_done", "error_event",
    "hang_mid_stream", "reset_before_head", "garbage", "oversized_line",
)  # fmt: skip
PLAIN_FAULTS = ("reset_before_head", "garbage", "garbage_json", "truncated_body", "eof_mid_stream")
EXPECTED = {200, 401, 402, 403, 429, 502, 503, 504}


class Exchange(Struct, eq=False):
    """What one client sent and was told; instants of the monotonic clock, amounts in µcr."""

    person: Person
    streamed: bool
    sent_at: float
    ended_at: float = 0.0
    status: int = 0
    request_id: str = ""
    told_ucr: int | None = None
    whole: bool = False
    left: bool = False


class Noted:
    """All exchanges of a run, and what no single answer may say."""

    def __init__(self) -> None:
        self.exchanges: list[Exchange] = []
        self.wrong: list[str] = []
        self.counts: Counter[str] = Counter()

    def add(self, exchange: Exchange, answer: Answer) -> None:
        exchange.ended_at = time.monotonic()
        exchange.status, exchange.request_id = answer.status, answer.request_id
        exchange.told_ucr = credits_of(answer)
        ended = answer.complete and (not exchange.streamed or b"[DONE]" in answer.body)
        exchange.whole = ended and answer.status == 200
        self.exchanges.append(exchange)
        self.counts["requests"] += 1
        self.counts["streams"] += exchange.streamed
        self.counts["left by their clients"] += exchange.left
        self.counts["whole"] += exchange.whole
        self.counts[said(answer)] += 1
        self._judge(exchange, answer)

    def _judge(self, exchange: Exchange, answer: Answer) -> None:
        person, status = exchange.person, answer.status
        says = f"{person.kind} {exchange.request_id} {status} {bytes(answer.body)[:200]!r}"
        if status and status not in EXPECTED:
            self.wrong.append(f"an answer nobody expects: {says}")
        if status == 401 and not person.may_be_unknown(exchange.ended_at):
            self.wrong.append(f"401 for a valid key: {says}")
        if status == 200 and person.must_be_refused(exchange.sent_at, exchange.ended_at):
            self.wrong.append(f"served after it was forbidden: {says}")
        if status == 200 and not exchange.request_id:
            self.wrong.append(f"no request id: {says}")
        if exchange.whole and exchange.told_ucr is None:
            self.wrong.append(f"whole, but not told what it cost: {says}")
        if status == 503 and "retry-after" not in answer.headers:
            self.wrong.append(f"503 without Retry-After: {says}")


def said(answer: Answer) -> str:
    """Its status, and the code of an error."""
    if not answer.status:
        return "no answer"
    code = CODE.search(bytes(answer.body)) if answer.status != 200 else None
    return f"status {answer.status}" + (f" {code[1].decode()}" if code else "")


def credits_of(answer: Answer) -> int | None:
    """µcr that an answer says it cost; None if it does not."""
    if answer.status != 200:
        return None
    if "x-credits-used" in answer.headers:
        return parse_credits(answer.headers["x-credits-used"])
    found = CREDITS.findall(bytes(answer.body))
    return parse_credits(found[-1].decode()) if found else None


class Load:
    """`clients` that ask one thing after the other until stopped."""

    def __init__(self, site: Site, people: People, noted: Noted, seed: int, clients: int) -> None:
        self._site = site
        self._people = people
        self._noted = noted
        self._seed = seed
        self._clients = clients

    async def run(self, stopping: asyncio.Event) -> None:
        dice = [random.Random(f"{self._seed} client {number}") for number in range(self._clients)]
        async with asyncio.TaskGroup() as group:
            for one in dice:
                group.create_task(self._client(one, stopping))

    async def _client(self, dice: random.Random, stopping: asyncio.Event) -> None:
        wire: Wire | None = None
        while not stopping.is_set():
            wire = await self._exchange(wire, dice)
            await asyncio.sleep(AGAIN_SECONDS if wire is None else dice.uniform(0, 0.2))
        if wire is not None:
            wire.leave()

    async def _exchange(self, wire: Wire | None, dice: random.Random) -> Wire | None:
        """The connection, if it can be used again."""
        person = self._people.one(dice)
        streamed, data = question(person, dice)
        exchange = Exchange(person, streamed, time.monotonic())
        answer = Answer()
        half = dice.random() < HALF
        patience = min(HANG_SECONDS, leaving_after(dice))
        abruptly = dice.random() < 0.5
        slowly = dice if dice.random() < SLOW else None
        try:
            async with asyncio.timeout(patience):
                wire = wire or await Wire.open(self._site.port)
                wire.send(data[: len(data) // 2] if half else data)
                if not half:
                    await wire.read_into(answer, slowly)
        except TimeoutError:
            exchange.left = patience < HANG_SECONDS
            if not exchange.left:
                self._noted.wrong.append(f"no end within {HANG_SECONDS:.0f} s: {exchange}")
        except OSError:
            self._noted.counts["connections refused or reset"] += 1
        except httptools.HttpParserError as error:
            self._noted.wrong.append(f"not HTTP: {error}")
        exchange.left |= half
        if wire is not None:
            self._noted.add(exchange, answer)
            if answer.stays_open and not exchange.left:
                return wire
            wire.leave(abruptly)
        return None


def leaving_after(dice: random.Random) -> float:
    """Seconds, for those who leave; for the others longer than anything takes."""
    return dice.expovariate(4.0) if dice.random() < LEAVING else HANG_SECONDS


def question(person: Person, dice: random.Random) -> tuple[bool, bytes]:
    """Whether it is streamed, and the request."""
    streamed = dice.random() < 0.5
    script = stream_script(dice) if streamed else plain_script(dice)
    if dice.random() < FAULTY:
        script += ";" + fault_script(streamed, dice)
    content = "x" * dice.randrange(1, 400) + f" [[standin {script}]]"
    body: dict[str, object] = {
        "model": "sandbox",
        "messages": [{"role": "user", "content": content}],
    }
    if dice.random() < 0.8:
        body["max_tokens"] = dice.randrange(1, 400)
    if streamed:
        body["stream"] = True
        if dice.random() < 0.3:
            body["stream_options"] = {"include_usage": True}
    more = {"x-tollgate-credits-chunk": "off"} if dice.random() < 0.1 else None
    return streamed, request("POST", PATH, person.secret, body, more)


def stream_script(dice: random.Random) -> str:
    chunks, delay = dice.randrange(1, 40), dice.choice([0, 0, 5, 20, 60])
    script = f"chunks={chunks};chunk_bytes={dice.randrange(1, 40)};chunk_delay_ms={delay}"
    return script + dice.choice(["", "", "", ";usage=missing", ";usage=every_chunk", ";coalesce=1"])


def plain_script(dice: random.Random) -> str:
    delay = dice.choice([0, 0, 0, 10, 100, 400])
    script = f"delay_ms={delay};answer_bytes={dice.randrange(1, 3000)}"
    return script + dice.choice(["", "", "", ";usage=missing", ";encoding=chunked"])


def fault_script(streamed: bool, dice: random.Random) -> str:
    if dice.random() < 0.3:
        return "status=" + dice.choice(["500", "503", "429;retry_after=1"])
    return "fault=" + dice.choice(STREAM_FAULTS if streamed else PLAIN_FAULTS)
