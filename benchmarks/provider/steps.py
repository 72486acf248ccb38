"""An answer as timed steps: what is written when, and how it ends, faults included.

Owns the order of events and every scripted fault, as a pure sequence of
`(delay_seconds, bytes or Ending)`. Leaves the clock and the socket to `pace`, the JSON
to `answers` and the wire form to `framing`.

Each bytes step is one write on the socket, in its own turn of the event loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from benchmarks.provider import answers
from benchmarks.provider.answers import Ask, ChunkWriter
from benchmarks.provider.framing import (
    GAP_SECONDS,
    JSON_TYPE,
    Ending,
    Stamped,
    Step,
    head,
    http_chunk,
    shaped,
    sse,
    stamped,
    whole,
)
from benchmarks.provider.script import Script

HTML_PAGE = b"<!DOCTYPE html><html><body><h1>Just a moment...</h1></body></html>"
GARBAGE = b"\x16\x03\x01\x00\x00 this is not HTTP \xff\xfe\r\n\r\n"
MISSING_BYTES = 100


@lru_cache(maxsize=512)
def immediate_parts(ask: Ask) -> tuple[bytes, bytes] | None:
    """The bytes before and after the id of an answer that is one write, else None.

    Answers differ only in their id (of constant length), so a plain answer costs one
    look-up and one concatenation instead of an encoding: 0.6 µs instead of 4.4 µs.
    """
    script = ask.script
    simple = script.fault == "none" and script.status is None and script.delay_ms == 0
    if ask.stream or not simple or script.encoding not in (None, "content_length"):
        return None
    answer = whole(200, answers.plain_answer(ask, unique_id(0)))
    before, marker, after = answer.partition(unique_id(0).encode())
    return (before, after) if marker else (answer, b"")


def unique_id(number: int) -> str:
    """The id of the `number`th answer; 24 characters up to 2^48 answers."""
    return f"chatcmpl-std{number:012x}"


def steps_for(ask: Ask, unique: str) -> Iterator[Step]:
    """Every step of the answer to `ask`; ends with exactly one `Ending`."""
    script = ask.script
    delay = script.delay_ms / 1000
    if script.status is not None:
        return failed_steps(script, delay)
    early = faults_before_head(ask, unique, delay)
    if early is not None:
        return iter(early)
    return streamed_steps(ask, unique, delay) if ask.stream else plain_steps(ask, unique, delay)


def failed_steps(script: Script, delay: float) -> Iterator[Step]:
    """An HTTP error in OpenAI's form, with `retry-after` if scripted."""
    status = script.status or 500
    extra = [] if script.retry_after is None else [("retry-after", str(script.retry_after))]
    yield delay, whole(status, answers.error_body(status), extra=extra)
    yield 0.0, Ending.COMPLETE


def faults_before_head(ask: Ask, unique: str, delay: float) -> list[Step] | None:
    """The steps of a fault that replaces the whole answer, or None."""
    kind = "text/event-stream" if ask.stream else JSON_TYPE
    match ask.script.fault:
        case "reset_before_head":
            return [(delay, Ending.RESET)]
        case "hang_before_head":
            return [(delay, Ending.HANG)]
        case "garbage":
            return [(delay, GARBAGE), (GAP_SECONDS, Ending.CLOSE)]
        case "garbage_json":
            body = answers.plain_answer(ask, unique)
            return [(delay, whole(200, body[: len(body) // 2])), (0.0, Ending.COMPLETE)]
        case "html":
            return [(delay, whole(200, HTML_PAGE, "text/html")), (0.0, Ending.COMPLETE)]
        case "truncated_body":
            body = b"".join(sse_events(ask, unique)) if ask.stream else ask_body(ask, unique)
            line = f"content-length: {len(body) + MISSING_BYTES}"
            return [(delay, head(200, kind, line) + body), (GAP_SECONDS, Ending.CLOSE)]
    return None


def ask_body(ask: Ask, unique: str) -> bytes:
    """The body of a plain answer, or of the error a provider hides in a 200."""
    if ask.script.fault == "error_event":
        return answers.error_body(500)
    return answers.plain_answer(ask, unique)


def plain_steps(ask: Ask, unique: str, delay: float) -> Iterator[Step]:
    """A plain answer in the scripted encoding; mid-stream faults strike half-way."""
    script = ask.script
    body = ask_body(ask, unique)
    encoding = script.encoding or "content_length"
    line = {
        "chunked": "transfer-encoding: chunked",
        "content_length": f"content-length: {len(body)}",
        "close": "connection: close",
    }[encoding]
    start = head(200, JSON_TYPE, line)
    half = len(body) // 2
    first, second = body[:half], body[half:]
    ending = MID_STREAM_ENDINGS.get(script.fault)
    if encoding == "chunked":
        first, second = http_chunk(first), http_chunk(second) + b"0\r\n\r\n"
    if ending is not None:
        yield delay, start + first
        yield GAP_SECONDS, ending
        return
    yield delay, start + first + second
    yield 0.0, Ending.CLOSE if encoding == "close" else Ending.COMPLETE


MID_STREAM_ENDINGS = {
    "reset_mid_stream": Ending.RESET,
    "eof_mid_stream": Ending.CLOSE,
    "hang_mid_stream": Ending.HANG,
}


def streamed_steps(ask: Ask, unique: str, delay: float) -> Iterator[Step]:
    """A streamed answer: the head together with the first event, then event by event."""
    chunked = ask.script.encoding != "close"
    line = "transfer-encoding: chunked" if chunked else "connection: close"
    start = head(200, "text/event-stream; charset=utf-8", line)
    if ask.script.first_chunk_delay_ms:
        yield delay, start
        delay, start = 0.0, b""
    last: object = None
    framed: bytes | Stamped = b""
    for wait, payload in shaped(ask.script, event_steps(ask, unique)):
        if not isinstance(payload, bytes):
            if payload is Ending.COMPLETE:
                yield wait + delay, start + b"0\r\n\r\n" if chunked else Ending.CLOSE
                wait = delay = 0.0
            yield wait + delay, payload
            return
        if payload is not last:
            data = http_chunk(payload) if chunked else payload
            last, framed = payload, stamped(data) if ask.script.stamp else data
        if start:
            yield wait + delay, preceded(start, framed)
            delay, start = 0.0, b""
        else:
            yield wait, framed


def preceded(start: bytes, framed: bytes | Stamped) -> bytes | Stamped:
    """`framed` with `start` before it, in one write."""
    if isinstance(framed, Stamped):
        return framed._replace(before=start + framed.before)
    return start + framed


def event_steps(ask: Ask, unique: str) -> Iterator[Step]:
    """The SSE events of a stream, each with the delay before it; faults included."""
    script, writer = ask.script, ChunkWriter(ask, unique)
    wait = script.first_chunk_delay_ms / 1000
    if ask.kind == "chat":
        yield wait, sse(script, writer.role())
        wait = script.chunk_delay_ms / 1000
    pieces = writer.content.pieces
    fault_at = fault_position(script, len(pieces))
    if fault_at is None:
        yield from content_steps(writer, wait)
    else:
        yield from content_steps(writer, wait, 0, fault_at)
        ends = False
        for step in fault_steps(script, writer):
            ends = step[1].__class__ is not bytes
            yield step
        if ends:
            return
        yield from content_steps(writer, script.chunk_delay_ms / 1000, fault_at)
    yield from closing_steps(script, writer)


def fault_position(script: Script, count: int) -> int | None:
    """After how many content chunks the mid-stream fault strikes, or None without one."""
    mid_stream = (*MID_STREAM_ENDINGS, "end_mid_stream", "error_event", "oversized_line")
    if script.fault not in mid_stream:
        return None
    return min(count, (count + 1) // 2 if script.fault_after is None else script.fault_after)


def content_steps(
    writer: ChunkWriter, wait: float, start: int = 0, stop: int | None = None
) -> Iterator[Step]:
    """The content chunks from `start` to `stop`; a repeated piece is encoded once."""
    script, pieces = writer.ask.script, writer.content.pieces
    pause = script.chunk_delay_ms / 1000
    counted = script.usage == "every_chunk"
    last_piece: str | None = None
    step: tuple[float, bytes] = (0.0, b"")
    so_far = sum(len(piece.encode()) for piece in pieces[:start]) if counted else 0
    for piece in pieces[start:stop]:
        if counted:
            so_far += len(piece.encode())
            tokens = answers.tokens_in(so_far) + script.reasoning_tokens
            tokens = min(tokens, writer.content.completion_tokens)
            step = (wait, sse(script, writer.piece(piece, tokens)))
        elif piece is not last_piece or step[0] != wait:
            last_piece = piece
            step = (wait, sse(script, writer.piece(piece, 0)))
        yield step
        wait = pause


def fault_steps(script: Script, writer: ChunkWriter) -> Iterator[Step]:
    """What a mid-stream fault does; goes on after it only for `oversized_line`."""
    if script.fault == "oversized_line":
        text = answers.text_of(answers.OVERSIZED_LINE_BYTES, answers.DEFAULT_TEXT)
        yield script.chunk_delay_ms / 1000, sse(script, writer.piece(text, 0))
    elif script.fault == "error_event":
        yield script.chunk_delay_ms / 1000, sse(script, answers.error_body(500))
        yield 0.0, Ending.COMPLETE
    elif script.fault == "end_mid_stream":
        yield script.chunk_delay_ms / 1000, Ending.COMPLETE
    else:
        yield GAP_SECONDS, MID_STREAM_ENDINGS[script.fault]


def closing_steps(script: Script, writer: ChunkWriter) -> Iterator[Step]:
    """Finish chunk, usage chunk, `[DONE]`, in the scripted order, and the end."""
    yield script.chunk_delay_ms / 1000, sse(script, writer.finish())
    late = script.usage == "late_after_done"
    if writer.sends_usage() and not late:
        yield 0.0, sse(script, writer.usage())
    if script.fault != "eof_without_done":
        yield 0.0, sse(script, b"[DONE]")
    if late:
        yield 0.0, sse(script, writer.usage())
    yield 0.0, Ending.COMPLETE


def sse_events(ask: Ask, unique: str) -> Iterator[bytes]:
    """The events of a stream without their timing."""
    for _, payload in event_steps(ask, unique):
        if isinstance(payload, bytes):
            yield payload
