"""The stand-in provider: an OpenAI-compatible server that does what a request scripts.

    python -m benchmarks.provider --listen 127.0.0.1:8090 [--workers N] [--api-key KEY]
                                  [--script "k=v;k=v"]

    async with StandInProvider(port=0) as provider:
        provider.script(fault="reset_mid_stream")       # the next request
        ...                                             # provider.base_url
        await provider.wait_until(lambda: provider.aborted == 1)

It serves POST /v1/chat/completions, /v1/completions, /v1/embeddings and GET /v1/models.
Tests, the sandbox of `make run` and the benchmarks use it in place of a real provider.

A request's script is, each over the one before: `default_script`; the next of those
queued by `script(**fields)`; `[[standin k=v; k=v]]` at the end of the model name; the
same in the last user message (or `prompt`, or `input`); the header `x-standin: k=v;k=v`.
A script that cannot be read answers 400 with code `standin_script`.

    field                 what it does (default: a well-behaved provider)
    delay_ms              wait before the head
    first_chunk_delay_ms  wait between the head and the first event of a stream
    chunk_delay_ms        wait before each further content event and the finish event
    chunks, chunk_bytes   content events of a stream; bytes of content in each
    answer_bytes          bytes of content of a plain answer
    prompt_tokens         reported; default one per four bytes of the request body
    completion_tokens     reported; default one per four bytes of content + reasoning
    cached_tokens, reasoning_tokens   reported in the details
    obey_max=0            ignore max_tokens / max_completion_tokens
    finish_reason         instead of stop / length
    usage                 normal (also if not asked for), missing, zero, null,
                          in_last_content_chunk (in the finish chunk, the last that has
                          a choice), every_chunk (cumulative, and the usual one),
                          late_after_done; default as_asked (stream_options)
    id                    normal, null, constant, missing, junk
    status, retry_after   HTTP error in OpenAI's form; Retry-After in seconds
    encoding              chunked, content_length, close (plain); close also for streams
    fault                 reset_before_head, hang_before_head
                          garbage (not HTTP), html (200 text/html), garbage_json (200 cut)
                          truncated_body (Content-Length larger than what is sent)
                          reset_mid_stream, hang_mid_stream
                          eof_mid_stream (closed without the last HTTP chunk)
                          end_mid_stream (well-formed HTTP end, no finish, no [DONE])
                          eof_without_done (everything but [DONE])
                          error_event (an error object in a 200, then the end)
                          oversized_line (one event of 1 MB, then the stream goes on)
    fault_after           content events before a mid-stream fault; default half of them
    crlf=1, no_space=1    lines end in CRLF; `data:{…}`
    comments=1            `: ping` comment before each event
    split_utf8=1          multi-byte text, each event cut inside a character in two writes
    split_events=1        each event cut at offsets drawn from `seed` in several writes
    coalesce=1            up to eight events in one write
    stamp=1               each content starts with `@` and CLOCK_MONOTONIC in nanoseconds (19
                          digits) at its writing, so that a reader here knows its age

Mid-stream faults of a plain answer strike after half of its body. Each event is its own
write unless coalesced; the head goes with the first event unless first_chunk_delay_ms.
"""

from benchmarks.provider.connection import Request
from benchmarks.provider.script import DEFAULT_SCRIPT, Script, ScriptError, amended, script_from
from benchmarks.provider.server import StandInProvider

__all__ = [
    "DEFAULT_SCRIPT",
    "Request",
    "Script",
    "ScriptError",
    "StandInProvider",
    "amended",
    "script_from",
]
