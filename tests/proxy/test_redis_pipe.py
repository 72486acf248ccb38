"""The pipe to Redis: replies in order, one callback each, and its return from every outage."""

import asyncio
import select
from collections.abc import Awaitable, Callable
from typing import Any

import hiredis
import pytest
from redis.asyncio import Redis

from accounting.contract.scripts import SCRIPTS
from proxy.redis_pipe import RedisDown, RedisPipe, pack
from tests.proxy.redis_scene import Between, open_pipe
from tests.waiting import eventually, free_port

PING = pack(("PING",))
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Replies(list[Any]):
    """Collects what callbacks get; `of(n)` are n callbacks, each of which must come once."""

    def of(self, number: int) -> list[Callable[[Any], None]]:
        return [lambda reply, n=n: self.append((n, reply)) for n in range(number)]  # type: ignore[misc]


class Server:
    """A TCP server that is no Redis: what it does with a connection is the test's affair."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self.connections = 0
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.append(writer)
        await self._handler(reader, writer)


async def greeted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Take the greeting of a pipe as Redis would."""
    for _ in SCRIPTS:
        while b"\r\n" not in await reader.read(65536):
            pass
        writer.write(b"+OK\r\n")


async def test_replies_come_in_order_each_to_its_command(
    redis_client: Redis, redis_url: str
) -> None:
    async with open_pipe(redis_url) as pipe:
        replies = Replies()
        for number, on_reply in enumerate(replies.of(500)):
            pipe.send(pack(("ECHO", str(number))), on_reply)
        assert not replies  # never from inside `send`
        await eventually(lambda: len(replies) == 500)
        assert replies == [(number, str(number).encode()) for number in range(500)]


async def test_an_error_reply_goes_to_its_command_alone(
    redis_client: Redis, redis_url: str
) -> None:
    async with open_pipe(redis_url) as pipe:
        with pytest.raises(hiredis.ReplyError, match="unknown command"):
            await pipe.command("NONSENSE")
        assert await pipe.command("ECHO", "x") == b"x"


async def test_commands_of_one_turn_are_written_at_once(
    redis_client: Redis, redis_url: str
) -> None:
    async with Between(redis_url) as between, open_pipe(between.url) as pipe:
        between.commands_seen = b""
        await asyncio.gather(pipe.command("GET", "a"), pipe.command("GET", "b"))
        assert between.commands_seen == pack(("GET", "a")) + pack(("GET", "b"))


async def test_no_redis_at_start_is_an_error() -> None:
    pipe = RedisPipe(f"redis://127.0.0.1:{free_port()}", 0.1, 10, lambda up: None)
    with pytest.raises(OSError):
        await pipe.start()
    assert not pipe.up


async def test_a_server_that_never_answers_fails_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with Server(hang) as url:
        pipe = RedisPipe(url, 0.05, 10, lambda up: None)
        with pytest.raises(TimeoutError):
            await pipe.start()
        assert not pipe.up


async def test_a_hung_redis_fails_all_that_wait_and_refuses_at_once(
    redis_client: Redis, redis_url: str
) -> None:
    async with Between(redis_url) as between, open_pipe(between.url, 0.05) as pipe:
        between.silent = True
        replies = Replies()
        for on_reply in replies.of(20):
            pipe.send(PING, on_reply)
        await eventually(lambda: len(replies) == 20)
        assert [number for number, _ in replies] == list(range(20))
        assert all(isinstance(reply, RedisDown) for _, reply in replies)
        assert not pipe.up
        # While the connection is being made again nothing waits for it.
        late = Replies()
        pipe.send(PING, late.of(1)[0])
        await asyncio.sleep(0)
        assert isinstance(late[0][1], RedisDown)


async def test_the_pipe_returns_when_redis_does(redis_client: Redis, redis_url: str) -> None:
    async with Between(redis_url) as between, open_pipe(between.url, 0.05) as pipe:
        between.silent = True
        with pytest.raises(RedisDown):
            await pipe.command("PING")
        between.silent = False
        between.cut()  # a connection made meanwhile had its greeting swallowed
        await eventually(lambda: pipe.up)
        assert await pipe.command("ECHO", "back") == b"back"
        assert pipe.changes == [True, False, True]  # type: ignore[attr-defined]


async def test_a_reset_fails_what_waits_and_is_mended(redis_client: Redis, redis_url: str) -> None:
    async with Between(redis_url) as between, open_pipe(between.url) as pipe:
        between.silent = True
        waiting = asyncio.gather(*(pipe.command("PING") for _ in range(5)), return_exceptions=True)
        await eventually(lambda: between.commands_seen.count(b"PING") == 5)
        between.silent = False
        between.cut()
        assert all(isinstance(reply, RedisDown) for reply in await waiting)
        await eventually(lambda: pipe.up)
        assert await pipe.command("ECHO", "back") == b"back"


async def test_tries_again_until_redis_is_there(redis_client: Redis, redis_url: str) -> None:
    async with Between(redis_url) as between, open_pipe(between.url) as pipe:
        between.closed = True
        between.cut()
        await eventually(lambda: not pipe.up)
        with pytest.raises(RedisDown):
            await pipe.command("PING")
        between.closed = False
        await eventually(lambda: pipe.up)
        assert pipe.changes == [True, False, True]  # type: ignore[attr-defined]


async def test_no_command_goes_ahead_of_the_greeting(redis_client: Redis, redis_url: str) -> None:
    """Before AUTH and SELECT have answered, nobody's command may pass."""
    async with Between(redis_url) as between:
        assert between.url.endswith("/0")
        async with open_pipe(between.url[:-1] + "1") as pipe:
            await pipe.command("SET", "where", "one")
            for _ in range(20):
                seen = len(pipe.changes)  # type: ignore[attr-defined]
                between.cut()
                async with asyncio.timeout(5):
                    while len(pipe.changes) < seen + 2:  # type: ignore[attr-defined]
                        try:
                            assert await pipe.command("GET", "where") == b"one"
                        except RedisDown:
                            await asyncio.sleep(0)
                assert await pipe.command("GET", "where") == b"one"
            await pipe.command("DEL", "where")


async def test_a_wrong_password_is_a_failed_start(redis_client: Redis, redis_url: str) -> None:
    address = redis_url.rpartition("@")[2]
    pipe = RedisPipe(f"redis://:wrong@{address}", 1.0, 10, lambda up: None)
    with pytest.raises(ConnectionError, match="refused the greeting"):
        await pipe.start()


async def test_pending_commands_are_bounded(redis_client: Redis, redis_url: str) -> None:
    async with open_pipe(redis_url, pending_limit=10) as pipe:
        replies = Replies()
        for on_reply in replies.of(15):
            pipe.send(PING, on_reply)
        await eventually(lambda: len(replies) == 15)
        refused = {number for number, reply in replies if isinstance(reply, RedisDown)}
        assert refused == set(range(10, 15))
        assert pipe.up


async def test_scripts_lost_by_redis_are_loaded_again(redis_client: Redis, redis_url: str) -> None:
    async with open_pipe(redis_url) as pipe:
        await redis_client.script_flush()
        release = ("EVALSHA", SCRIPTS["release"].digest, 2, "{s00}:ws:x", "{s00}:l", "b", "k", "w")
        found = await asyncio.gather(
            *(pipe.command(*release) for _ in range(3)), return_exceptions=True
        )
        assert all(str(reply).startswith("NOSCRIPT") for reply in found)
        assert await pipe.command(*release) == bytes(3 * 8)
        known = await redis_client.script_exists(*(script.digest for script in SCRIPTS.values()))
        assert all(known)
        await redis_client.script_flush()  # and again
        with pytest.raises(hiredis.ReplyError):
            await pipe.command(*release)
        assert await pipe.command(*release) == bytes(3 * 8)


async def test_a_callback_that_raises_costs_no_one_else_a_reply(
    redis_client: Redis, redis_url: str
) -> None:
    caught: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: caught.append(context))

    def broken(reply: Any) -> None:
        raise ValueError("a bug")

    async with Between(redis_url) as between, open_pipe(between.url) as pipe:
        replies = Replies()
        first, second = replies.of(2)
        pipe.send(PING, broken)
        pipe.send(PING, first)
        await eventually(lambda: len(replies) == 1)
        between.silent = True
        pipe.send(PING, broken)
        pipe.send(PING, second)
        await eventually(lambda: between.commands_seen.count(b"PING") == 4)
        between.cut()
        await eventually(lambda: len(replies) == 2)
        assert [str(context["exception"]) for context in caught] == ["a bug", "a bug"]
        assert pipe.changes[:2] == [True, False]  # type: ignore[attr-defined]


@pytest.mark.parametrize("garbage", [b"HTTP/1.1 400 Bad\r\n\r\n", b"+OK\r\n+OK\r\n+OK\r\n"])
async def test_what_is_not_redis_is_left(garbage: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await greeted(reader, writer)
        await reader.read(65536)
        writer.write(garbage)
        await reader.read()

    caught: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: caught.append(context))
    server = Server(talk)
    async with server as url, open_pipe(url) as pipe:
        replies = Replies()
        pipe.send(PING, replies.of(1)[0])
        await eventually(lambda: server.connections == 2)
        assert len(replies) == 1
        assert not caught


def await_blocking(pipe: RedisPipe) -> None:
    """Stand still, as a busy loop does, until a reply of Redis lies unread."""
    assert pipe._transport is not None
    readable, _, _ = select.select([pipe._transport.get_extra_info("socket").fileno()], [], [], 5)
    assert readable


async def test_a_loop_that_stood_still_is_not_a_hung_redis(
    redis_client: Redis, redis_url: str
) -> None:
    """What seems late may only be unread: it is read before anyone is given up."""
    async with open_pipe(redis_url) as pipe:
        reply = asyncio.ensure_future(pipe.command("ECHO", "x"))
        await asyncio.sleep(0)  # sent
        await asyncio.sleep(0)  # written
        sent_at, on_reply = pipe._waiting[0]
        pipe._waiting[0] = sent_at - 60, on_reply
        await_blocking(pipe)
        await pipe._check_oldest()
        assert await reply == b"x"
        assert pipe.changes == [True]  # type: ignore[attr-defined]


async def test_stop_fails_what_waits_and_says_nothing(redis_client: Redis, redis_url: str) -> None:
    async with Between(redis_url) as between, open_pipe(between.url) as pipe:
        between.silent = True
        replies = Replies()
        pipe.send(PING, replies.of(1)[0])
        await pipe.stop()
        assert isinstance(replies[0][1], RedisDown)
        pipe.send(PING, replies.of(1)[0])
        await eventually(lambda: len(replies) == 2)
        assert isinstance(replies[1][1], RedisDown)
        assert pipe.changes == [True]  # type: ignore[attr-defined]
