"""Requests read from any bytes: one reading, however they are cut, and no other than the RFC's."""

from typing import NamedTuple

from hypothesis import event, example, given
from hypothesis import strategies as st

from accounting.contract.errors import BodyTooLarge, Failure, HeadTooLarge, MalformedHttp
from accounting.contract.settings import Settings
from proxy.request_reader import FAST_PATHS, RequestReader
from tests.fuzz.effort import search
from tests.fuzz.http_grammar import CUTS, RAW, cut, mutated, repeats, requests
from tests.fuzz.reference_http import read

SETTINGS = Settings(head_limit_bytes=1024, body_limit_bytes=1024, pipeline_depth=2)
BYTES = st.one_of(
    mutated(), RAW, st.lists(requests(), max_size=4).map(b"".join), repeats().map(b"".join)
)

LENGTH = b"content-length"


class Taken(NamedTuple):
    """A request as the front door takes it from its reader."""

    method: bytes
    path: bytes
    headers: dict[bytes, bytes]
    body: bytes
    http_1_0: bool
    keep_alive: bool


class Outcome(NamedTuple):
    taken: list[Taken]
    failure: type[Failure] | None
    foreign: bytes
    within: str


def read_through(pieces: list[bytes], eager: bool) -> Outcome:
    """What a front door takes; reading pauses while the reader is full, or has turned foreign."""
    reader = RequestReader(SETTINGS)
    taken: list[Taken] = []
    failures: list[Failure] = []
    waiting = list(pieces)

    def take() -> None:
        was_full = reader.full
        found = reader.requests.popleft()
        assert not failures, "a request after a refusal"
        if found.failure is not None:
            failures.append(found.failure)
        else:
            head = found.head
            message = head.method, head.path, head.headers, found.body
            taken.append(Taken(*message, head.http_1_0, found.keep_alive))
        if was_full:
            reader.feed(b"")

    while waiting or reader.requests:
        if reader.requests and (eager or reader.full or not waiting):
            take()
        elif reader.foreign or reader.ended:
            break
        else:
            reader.feed(waiting.pop(0))
            assert not reader.owes_continue or reader.within == "body"
    while reader.requests:
        take()
    assert reader.ended or not (failures or reader.foreign)
    foreign = reader.foreign + b"".join(waiting) if reader.foreign else b""
    failure = type(failures[0]) if failures else None
    return Outcome(taken, failure, foreign, "" if reader.ended else reader.within)


def values_of(headers: dict[bytes, bytes]) -> dict[bytes, list[bytes]]:
    """Headers without the space around their values, also where several were joined; without
    the length, which a head that repeats has of its first: the bodies are compared."""
    lists = {name: value.split(b",") for name, value in headers.items() if name != LENGTH}
    return {name: [value.strip(b" \t") for value in values] for name, values in lists.items()}


def assert_is_the_rfcs(data: bytes, outcome: Outcome) -> None:
    """Nothing was accepted that a strict reading refuses or reads otherwise."""
    reading = read(data)
    for index, mine in enumerate(outcome.taken):
        assert index < len(reading.messages), (mine, reading)
        theirs = reading.messages[index]
        assert (mine[:2], mine[3:5]) == (theirs[:2], theirs[3:5])
        assert values_of(mine.headers) == values_of(theirs.headers)
        assert theirs.may_keep or not mine.keep_alive
        assert mine.method == b"POST" and mine.path in FAST_PATHS
    rest = reading.messages[len(outcome.taken) :]
    if outcome.foreign:
        start = len(data) - len(outcome.foreign)
        before = outcome.taken and reading.messages[len(outcome.taken) - 1].end
        assert start - (before or 0) in (0, 2) and not data[before or 0 : start].strip(b"\r\n")
        assert not rest or rest[0].path not in FAST_PATHS
    elif outcome.failure is None:
        assert not rest, "a whole request was left waiting"
        if outcome.within == "body":
            assert reading.ending in ("body", "refused")


@search(250)
@given(BYTES, CUTS, st.booleans())
@example(b"\r\n\r\nPOST / HTTP/1.1\r\n\r\n", [2], True)
def test_any_bytes_cut_anywhere_are_read_as_one(
    data: bytes, places: list[int], eager: bool
) -> None:
    whole = read_through([data], True)
    event(f"{len(whole.taken)} taken")
    event(f"{whole.failure and whole.failure.__name__}")
    for pieces in (cut(data, places), [data[n : n + 1] for n in range(len(data))]):
        found = read_through(pieces, eager)
        if {whole.failure, found.failure} == {HeadTooLarge, MalformedHttp}:
            assert found.taken == whole.taken  # it is both: which is seen first is chance
        else:
            assert found == whole
    assert_is_the_rfcs(data, whole)


@search(120)
@given(st.lists(requests(), min_size=1, max_size=4) | repeats(), CUTS)
def test_whatever_the_rfc_allows_is_taken(sent: list[bytes], places: list[int]) -> None:
    data = b"".join(sent)
    reading = read(data)
    assert len(reading.messages) == len(sent) and reading.ending == "head"
    outcome = read_through(cut(data, places), True)
    if outcome.failure in (HeadTooLarge, BodyTooLarge):
        return
    ours = len(sent)
    for index, message in enumerate(reading.messages):
        if message.path not in FAST_PATHS:
            ours = min(ours, index)
    assert outcome.failure is None
    assert len(outcome.taken) == ours
    assert_is_the_rfcs(data, outcome)
