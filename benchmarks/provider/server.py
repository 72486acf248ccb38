"""The stand-in provider itself: routes, scripts and what tests can ask about it.

Owns the listening socket, the script queue, the record of requests and the counters.
Leaves HTTP to `connection`, timing to `pace`, wording to `answers`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator

import msgspec

from benchmarks.provider import answers
from benchmarks.provider.answers import EMBEDDING_DIMENSIONS, Ask, Kind
from benchmarks.provider.connection import ProviderConnection, Request
from benchmarks.provider.framing import Step, whole
from benchmarks.provider.pace import Metronome
from benchmarks.provider.script import (
    DEFAULT_SCRIPT,
    Script,
    ScriptError,
    amended,
    script_from,
    split_directive,
)
from benchmarks.provider.steps import immediate_parts, steps_for, unique_id

DEFAULT_RECORDED = 1000
MAX_QUEUED_SCRIPTS = 100_000
DEFAULT_MODELS = ("sandbox", "gpt-4o-mini", "gpt-4o", "text-embedding-3-small")
ROUTES: dict[str, Kind] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completion",
    "/v1/embeddings": "embedding",
}
DIRECTIVE_MARK = b"[[standin"


class StreamOptions(msgspec.Struct):
    """The member `stream_options` of a request."""

    include_usage: bool | None = None


class Body(msgspec.Struct):
    """What the stand-in reads of a request body; everything else is skipped."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    dimensions: int | None = None
    encoding_format: str | None = None
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()


decode_body = msgspec.json.Decoder(Body).decode


class StandInProvider:
    """An OpenAI-compatible server that does what each request's script says.

    `async with StandInProvider(port=0) as provider:` listens until the block ends.
    `requests` keeps the last `recorded` requests, oldest first. `aborted` counts the
    requests whose client left before the answer ended; hung answers count when their
    client gives up.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        api_key: str | None = None,
        *,
        default_script: Script = DEFAULT_SCRIPT,
        models: tuple[str, ...] = DEFAULT_MODELS,
        recorded: int = DEFAULT_RECORDED,
        reuse_port: bool = False,
    ) -> None:
        self.host, self.port = host, port
        self.default_script = default_script
        self.models = models
        self.requests: deque[Request] = deque(maxlen=recorded)
        self.served = 0
        self.aborted = 0
        self._authorization = None if api_key is None else f"Bearer {api_key}".encode()
        self._recorded = recorded
        self._reuse_port = reuse_port
        self._scripts: deque[dict[str, object]] = deque()
        self._connections: set[ProviderConnection] = set()
        self._watchers: set[asyncio.Event] = set()

    @property
    def base_url(self) -> str:
        """The base URL to give to a client, ending in `/v1`."""
        return f"http://{self.host}:{self.port}/v1"

    @property
    def open_connections(self) -> int:
        """How many client connections are open now."""
        return len(self._connections)

    async def __aenter__(self) -> StandInProvider:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen; afterwards `port` is the real one. Raises `OSError` if it is taken."""
        loop = asyncio.get_running_loop()
        self.metronome = Metronome(loop)
        self._server = await loop.create_server(
            lambda: ProviderConnection(self),
            self.host,
            self.port,
            backlog=4096,
            reuse_port=self._reuse_port or None,
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening, drop every connection and wait until all are gone."""
        self._server.close()
        self.metronome.stop()
        for connection in list(self._connections):
            connection.abort()
        await self.wait_until(lambda: not self._connections)
        await self._server.wait_closed()

    def script(self, *, times: int = 1, **fields: object) -> None:
        """Queue a script for the next `times` POST requests; raises `ScriptError`."""
        if len(self._scripts) + times > MAX_QUEUED_SCRIPTS:
            raise ScriptError("too many queued scripts")
        script_from(fields)
        self._scripts.extend([fields] * times)

    async def wait_until(
        self, condition: Callable[[], bool], timeout_seconds: float = 10.0
    ) -> None:
        """Wait until `condition()` holds, looking after every request and connection event.

        Raises `TimeoutError` after `timeout_seconds`.
        """
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            async with asyncio.timeout(timeout_seconds):
                while not condition():
                    changed.clear()
                    await changed.wait()
        finally:
            self._watchers.discard(changed)

    def connection_opened(self, connection: ProviderConnection) -> None:
        """A client connected."""
        self._connections.add(connection)
        self._tell_watchers()

    def connection_closed(self, connection: ProviderConnection, unanswered: int) -> None:
        """A connection ended with `unanswered` requests cut short by the client."""
        self._connections.discard(connection)
        self.aborted += unanswered
        self._tell_watchers()

    def _tell_watchers(self) -> None:
        for watcher in self._watchers:
            watcher.set()

    def answer(self, request: Request) -> bytes | Iterator[Step]:
        """The answer to `request`: all of its bytes, or its steps in time."""
        self.served += 1
        if self._recorded:
            self.requests.append(request)
        if self._watchers:
            self._tell_watchers()
        kind = ROUTES.get(request.path)
        if self._authorization is not None and not self._is_authorized(request):
            return refusal(401, "Incorrect API key provided.")
        if kind is None or request.method != "POST":
            return self._other(request)
        try:
            ask = self._ask(kind, request)
        except ScriptError as problem:
            return refusal(400, f"Stand-in script: {problem}", "standin_script")
        except (msgspec.DecodeError, UnicodeDecodeError) as problem:
            return refusal(400, f"We could not parse the JSON body of your request: {problem}")
        parts = immediate_parts(ask)
        if parts is None:
            return steps_for(ask, unique_id(self.served))
        before, after = parts
        return before + unique_id(self.served).encode() + after if after else before

    def _is_authorized(self, request: Request) -> bool:
        return any(
            name.lower() == b"authorization" and value == self._authorization
            for name, value in request.raw_headers
        )

    def _other(self, request: Request) -> bytes:
        """Everything that is not an answer of a model."""
        known = request.path == "/v1/models" or request.path in ROUTES
        if request.path == "/v1/models" and request.method == "GET":
            return whole(200, answers.model_list(self.models, int(time.time())))
        if known:
            return refusal(405, f"Not allowed to {request.method} on {request.path}.")
        return refusal(404, f"Unknown request URL: {request.method} {request.path}.", "unknown_url")

    def _ask(self, kind: Kind, request: Request) -> Ask:
        """The parsed request with its script."""
        script = self.default_script
        if self._scripts:
            script = script_from(self._scripts.popleft(), script)
        body = decode_body(request.body)
        model = body.model
        if DIRECTIVE_MARK in request.body:
            model, script = directed(kind, body, script)
        if request.script_text is not None:
            script = amended(script, request.script_text)
        if request.version == "1.0":
            script = amended(script, "encoding=close")
        prompt_tokens = script.prompt_tokens
        if prompt_tokens is None:
            prompt_tokens = answers.tokens_in(len(request.body))
        options = body.stream_options
        ceiling = body.max_completion_tokens
        ask = Ask(
            kind,
            model,
            script,
            body.stream is True and kind != "embedding",
            options is not None and options.include_usage is True,
            body.max_tokens if ceiling is None else ceiling,
            prompt_tokens,
            int(time.time()),
        )
        return ask if kind != "embedding" else embedding_ask(ask, body)


def directed(kind: Kind, body: Body, script: Script) -> tuple[str, Script]:
    """The model name without its directive, and `script` with all directives over it."""
    model, text = split_directive(body.model)
    if text is not None:
        script = amended(script, text)
    text = split_directive(last_prompt(kind, body))[1]
    return model, script if text is None else amended(script, text)


def last_prompt(kind: Kind, body: Body) -> str:
    """The last user message of a chat, or the prompt or input of the other endpoints."""
    if kind != "chat":
        raw = body.prompt if kind == "completion" else body.input
        return text_in(msgspec.json.decode(raw)) if raw else ""
    messages = msgspec.json.decode(body.messages) if body.messages else []
    for message in reversed(messages if isinstance(messages, list) else []):
        if isinstance(message, dict) and message.get("role") == "user":
            return text_in(message.get("content"))
    return ""


def text_in(content: object) -> str:
    """All text of a content: a string, a list of strings, or a list of text parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        return text_in(content.get("text"))
    if isinstance(content, list):
        return " ".join(text_in(part) for part in content)
    return ""


def embedding_ask(ask: Ask, body: Body) -> Ask:
    """`ask` with what only embeddings have: one vector per input, of some dimensions."""
    inputs = msgspec.json.decode(body.input) if body.input else ""
    several = isinstance(inputs, list) and bool(inputs) and not isinstance(inputs[0], int)
    return ask._replace(
        inputs=len(inputs) if several else 1,
        dimensions=body.dimensions or EMBEDDING_DIMENSIONS,
        base64=body.encoding_format == "base64",
    )


def refusal(status: int, message: str, code: str | None = None) -> bytes:
    """A complete error answer."""
    return whole(status, answers.error_body(status, message, code))
