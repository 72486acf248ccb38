"""Pools: bounds, order, users that leave, addresses that change; nothing is left behind."""

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from accounting.contract.catalogue import Provider
from accounting.contract.errors import Failure, ProviderUnreachable, Unavailable
from accounting.contract.settings import Secret, Settings
from proxy.upstream import ProviderPool, Upstreams
from proxy.upstream_connection import UpstreamConnection
from tests.proxy.ends import http
from tests.waiting import eventually


def provider(host: str = "127.0.0.1", port: int = 1, name: str = "p", **fields: Any) -> Provider:
    known: dict[str, Any] = dict.fromkeys(
        f"{wait}_timeout_seconds" for wait in ("connect", "first_byte", "chunk", "total")
    )
    known |= {"tls": False, "path": "", "api_key": Secret(), "ca_file": ""}
    return Provider(name, host, port, **(known | fields))


class User:
    """Keeps what it was told."""

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.connection: UpstreamConnection | None = None
        self.refusal: Failure | None = None
        self.ended = ""

    def __repr__(self) -> str:
        return f"User({self.number})"

    def upstream_ready(self, connection: UpstreamConnection) -> None:
        assert self.connection is self.refusal is None
        self.connection = connection

    def upstream_refused(self, failure: Failure) -> None:
        assert self.connection is self.refusal is None
        self.refusal = failure

    def upstream_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        assert self.connection is not None

    def upstream_body(self, data: bytes) -> None:
        assert self.connection is not None

    def upstream_end(self) -> None:
        assert not self.ended
        self.ended = "end"

    def upstream_lost(self, garbled: bool) -> None:
        assert not self.ended
        self.ended = "lost"

    async def served(self) -> UpstreamConnection:
        await eventually(lambda: self.connection or self.refusal)
        assert self.connection is not None
        return self.connection


# Any history, against the simplest model


class Wire(asyncio.Transport):
    """A transport without a network."""

    def __init__(self, connection: UpstreamConnection) -> None:
        super().__init__()
        self._connection = connection
        self.closed = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self if name == "socket" else default

    def setsockopt(self, *option: int) -> None:
        self.option = option

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.closed

    def abort(self) -> None:
        if not self.closed:
            self.closed = True
            asyncio.get_running_loop().call_soon(self._connection.connection_lost, None)


class Dials:
    """Stands in for the network: each dial waits for the test's word."""

    def __init__(self, pool: ProviderPool) -> None:
        self._pool = pool
        self.wires: list[Wire] = []
        self.waiting: dict[User, asyncio.Future[None]] = {}
        pool._reach = self._reach  # type: ignore[method-assign]

    async def _reach(self, connection: UpstreamConnection) -> None:
        task = asyncio.current_task()
        (user,) = [one for one, dial in self._pool._dialling.items() if dial is task]
        assert isinstance(user, User)
        word = self.waiting[user] = asyncio.get_running_loop().create_future()
        try:
            await word
        finally:
            del self.waiting[user]
        wire = Wire(connection)
        self.wires.append(wire)
        connection.connection_made(wire)
        connection.address = "here"

    @property
    def open(self) -> int:
        return sum(not wire.closed for wire in self.wires)


class Model:
    """A pool as lists: who dials, who waits, who has a connection, and how many are idle."""

    def __init__(self, limit: int, waiting_limit: int) -> None:
        self.limit, self.waiting_limit = limit, waiting_limit
        self.dialling: list[User] = []
        self.waiting: list[User] = []
        self.using: list[User] = []
        self.refused: list[User] = []
        self.idle = 0

    def arrive(self, user: User) -> None:
        if self.idle:
            self.idle -= 1
            self.using.append(user)
        elif self.open < self.limit:
            self.dialling.append(user)
        elif len(self.waiting) < self.waiting_limit:
            self.waiting.append(user)
        else:
            self.refused.append(user)

    @property
    def open(self) -> int:
        return self.idle + len(self.using) + len(self.dialling)

    def finish(self, user: User) -> None:
        self.using.remove(user)
        if self.waiting:
            self.using.append(self.waiting.pop(0))
        else:
            self.idle += 1

    def fill(self) -> None:
        while self.waiting and self.open < self.limit:
            self.dialling.append(self.waiting.pop(0))


async def settle() -> None:
    """Let everything that is due happen."""
    for _ in range(8):
        await asyncio.sleep(0)


class History:
    """One pool, one model, the same steps."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        limit, waiting = chance.randint(1, 4), chance.randint(0, 5)
        settings = Settings(upstream_connections=limit, upstream_waiting=waiting)
        self.pool = ProviderPool(provider(), settings, None, _nowhere, _trusted)
        self.pool._seen = {"here": 0.0}
        self.dials = Dials(self.pool)
        self.model = Model(limit, waiting)
        self.users: list[User] = []
        self.gone: set[User] = set()

    async def step(self) -> None:
        model = self.model
        possible = ["arrive", "arrive"]
        possible += ["connect", "connect", "fail"] if model.dialling else []
        possible += ["finish", "finish", "lose", "abandon"] if model.using else []
        possible += ["leave"] if model.dialling or model.waiting else []
        possible += ["lose_idle"] if model.idle else []
        getattr(self, "_" + self.chance.choice(possible))()
        model.fill()
        await settle()

    def _arrive(self) -> None:
        user = User(len(self.users))
        self.users.append(user)
        self.model.arrive(user)
        self.pool.acquire(user)

    def _connect(self) -> None:
        user = self.chance.choice(self.model.dialling)
        self.model.dialling.remove(user)
        self.model.using.append(user)
        self.dials.waiting[user].set_result(None)

    def _fail(self) -> None:
        user = self.chance.choice(self.model.dialling)
        self.model.dialling.remove(user)
        self.model.refused.append(user)
        self.dials.waiting[user].set_exception(ConnectionRefusedError())

    def _leave(self) -> None:
        """Sometimes at the very moment at which its connection is there, or failed."""
        user = self.chance.choice(self.model.dialling + self.model.waiting)
        if user in self.model.dialling and self.chance.random() < 0.5:
            outcome = self.chance.choice([None, ConnectionRefusedError()])
            future = self.dials.waiting[user]
            future.set_exception(outcome) if outcome else future.set_result(None)
        self._depart(user)
        self.pool.forget(user)

    def _depart(self, user: User) -> None:
        self.gone.add(user)
        for who in (self.model.dialling, self.model.waiting, self.model.using):
            if user in who:
                who.remove(user)

    def _finish(self) -> None:
        user = self.chance.choice(self.model.using)
        self.model.finish(user)
        assert user.connection is not None
        user.connection.data_received(http(200, b"{}"))
        assert user.ended == "end"

    def _lose(self) -> None:
        user = self.chance.choice(self.model.using)
        self._depart(user)
        assert user.connection is not None and user.connection._transport is not None
        user.connection._transport.abort()

    def _abandon(self) -> None:
        user = self.chance.choice(self.model.using)
        self._depart(user)
        assert user.connection is not None
        user.connection.abandon()

    def _lose_idle(self) -> None:
        self.model.idle -= 1
        connection = self.chance.choice(list(self.pool._idle))
        assert connection._transport is not None
        connection._transport.abort()

    def check(self) -> None:
        pool, model = self.pool, self.model
        assert list(pool._waiting) == model.waiting
        assert set(pool._dialling) == set(model.dialling) == set(self.dials.waiting)
        assert len(pool._dials) == len(model.dialling)
        assert len(pool._idle) == model.idle
        assert len(pool._open) == model.idle + len(model.using) == self.dials.open
        assert {one.user for one in pool._open} - {None} == set(model.using)
        assert [user for user in self.users if user.refusal] == sorted(
            model.refused, key=lambda user: user.number
        )


async def _nowhere(host: str, port: int) -> list[str]:
    raise AssertionError("nobody asks")


def _trusted(name: str, why: str, before: bool) -> None:
    raise AssertionError("no TLS here")


@pytest.mark.interpreted
@pytest.mark.parametrize("seed", range(30))
async def test_any_history_is_the_models(seed: int) -> None:
    """Users arrive, leave at any moment, finish and break; connections come up, fail, die."""
    print(f"seed {seed}")
    history = History(random.Random(seed))
    for _ in range(400):
        await history.step()
        history.check()
    history.pool.close()
    await settle()
    assert history.pool.empty and not history.pool._dialling and not history.dials.open


# On real sockets


class Host:
    """Two loopback addresses with one port, and what they said to whom."""

    def __init__(self) -> None:
        self.addresses = ["127.0.0.1"]
        self.asked = 0
        self.visits: list[str] = []
        self.writers: list[asyncio.StreamWriter] = []

    async def open(self) -> None:
        first = socket.create_server(("127.0.0.1", 0))
        self.port = first.getsockname()[1]
        try:
            second = socket.create_server(("127.0.0.2", self.port))
        except OSError:  # somebody has that port there: take another
            first.close()
            await self.open()
            return
        self._servers = [
            await asyncio.start_server(self._visit, sock=one) for one in (first, second)
        ]

    def _visit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.visits.append(writer.get_extra_info("sockname")[0])
        self.writers.append(writer)

    async def resolve(self, host: str, port: int) -> list[str]:
        assert host == "api.example"
        self.asked += 1
        await asyncio.sleep(0)
        return list(self.addresses)

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        for writer in self.writers:
            writer.transport.abort()


def opened(upstreams: Upstreams, target: Provider) -> ProviderPool:
    upstreams.add([target])
    return upstreams.pools[target.name]


@asynccontextmanager
async def pool_of(
    host: Host, target: Provider | None = None, **settings: Any
) -> AsyncIterator[ProviderPool]:
    """The pool of `api.example`, which is at `host`."""
    await host.open()
    upstreams = Upstreams(Settings(**settings), _trusted, host.resolve)
    there = target or provider("api.example", host.port)
    yield opened(upstreams, there)
    upstreams.close()
    await host.close()
    await eventually(lambda: all(pool.empty for pool in upstreams.pools.values()))


async def use(pool: ProviderPool) -> User:
    user = User()
    pool.acquire(user)
    await user.served()
    return user


def finish(user: User) -> None:
    assert user.connection is not None
    user.connection.data_received(http(200, b"{}"))


async def test_each_new_connection_looks_the_name_up() -> None:
    host = Host()
    async with pool_of(host) as pool:
        first = await use(pool)
        host.addresses = ["127.0.0.2"]
        second = await use(pool)
        assert host.asked == 2
        await eventually(lambda: host.visits == ["127.0.0.1", "127.0.0.2"])
        finish(second)
        third = await use(pool)  # pooled: nothing to look up
        assert third.connection is second.connection and host.asked == 2
        assert first.connection is not third.connection


async def test_a_burst_asks_once() -> None:
    host = Host()
    async with pool_of(host) as pool:
        await asyncio.gather(*[use(pool) for _ in range(50)])
        assert host.asked == 1


async def test_a_user_that_leaves_does_not_end_the_lookup_of_others() -> None:
    host = Host()
    async with pool_of(host) as pool:
        leaving, staying = User(), User()
        pool.acquire(leaving)
        pool.acquire(staying)
        await asyncio.sleep(0)
        pool.forget(leaving)
        await staying.served()
        assert leaving.connection is leaving.refusal is None


async def test_the_next_address_is_tried_when_one_refuses() -> None:
    host = Host()
    host.addresses = ["127.0.0.3", "127.0.0.2"]
    async with pool_of(host) as pool:
        assert (await (await use(pool)).served()).address == "127.0.0.2"


async def test_a_name_that_leads_nowhere_is_unreachable() -> None:
    for resolve in (_no_such_name, _no_address):
        upstreams = Upstreams(Settings(), _trusted, resolve)
        pool, user = opened(upstreams, provider("api.example")), User()
        pool.acquire(user)
        await eventually(lambda user=user: user.refusal)
        assert isinstance(user.refusal, ProviderUnreachable) and pool.empty


async def _no_such_name(host: str, port: int) -> list[str]:
    raise socket.gaierror(socket.EAI_NONAME, "no such name")


async def _no_address(host: str, port: int) -> list[str]:
    return []


@pytest.mark.parametrize("host", ["a..b", "x" * 70 + ".example", "\xe9.invalid"])
async def test_a_name_that_cannot_be_looked_up_is_unreachable(host: str) -> None:
    upstreams = Upstreams(Settings(), _trusted)
    pool, user = opened(upstreams, provider(host)), User()
    pool.acquire(user)
    await eventually(lambda: user.refusal, 10)
    assert isinstance(user.refusal, ProviderUnreachable) and pool.empty


async def test_connections_to_a_vanished_address_die() -> None:
    """Those in use when they are done, idle ones at the next look."""
    host = Host()
    async with pool_of(host, upstream_idle_seconds=0.1) as pool:
        idle, busy = await use(pool), await use(pool)
        finish(idle)
        again = await use(pool)
        assert again.connection is idle.connection
        host.addresses = ["127.0.0.2"]
        await eventually(lambda: pool._loop.time() > min(pool._seen.values()) + 0.1)
        assert (await (await use(pool)).served()).address == "127.0.0.2"
        finish(again)
        finish(busy)
        assert not pool._idle
        await eventually(lambda: len(pool._open) == 1)


async def test_an_address_that_takes_turns_keeps_its_connections() -> None:
    host = Host()
    async with pool_of(host) as pool:
        first = await use(pool)
        host.addresses = ["127.0.0.2"]
        await use(pool)
        finish(first)
        assert len(pool._idle) == 1


async def test_an_old_connection_is_not_used_again() -> None:
    host = Host()
    async with pool_of(host, upstream_age_seconds=1.0) as pool:
        user = await use(pool)
        assert user.connection is not None
        user.connection.expires_at -= 1.1
        finish(user)
        assert not pool._idle
        await eventually(lambda: pool.empty)


@pytest.fixture
def deaf() -> Iterator[int]:
    """A port that answers no connection: its queue is full."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        callers = [socket.socket() for _ in range(4)]
        for caller in callers:
            caller.setblocking(False)
            caller.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]
        for caller in callers:
            caller.close()


async def test_connecting_has_its_time_out(deaf: int) -> None:
    """The provider's own, before the setting's; and it makes room for who waits."""
    settings = Settings(connect_timeout_seconds=60, upstream_connections=1)
    target = provider(port=deaf, connect_timeout_seconds=0.1)
    pool = opened(Upstreams(settings, _trusted), target)
    users = [User(), User()]
    for user in users:
        pool.acquire(user)
    await eventually(lambda: all(user.refusal for user in users))
    assert {type(user.refusal) for user in users} == {ProviderUnreachable} and pool.empty
    await settle()


async def test_a_deaf_address_leaves_time_for_the_next(deaf: int) -> None:
    async def both(host: str, port: int) -> list[str]:
        return ["127.0.0.1", "127.0.0.2"]

    loop = asyncio.get_running_loop()
    server = await loop.create_server(asyncio.Protocol, "127.0.0.2", deaf)
    target = provider("api.example", deaf, connect_timeout_seconds=0.4)
    upstreams = Upstreams(Settings(), _trusted, both)
    pool = opened(upstreams, target)
    user = await use(pool)
    assert user.connection is not None and user.connection.address == "127.0.0.2"
    upstreams.close()
    await eventually(lambda: pool.empty)
    server.close()
    await server.wait_closed()


async def test_beyond_its_bounds_a_pool_refuses() -> None:
    host = Host()
    async with pool_of(host, upstream_connections=1, upstream_waiting=1) as pool:
        first, waiting, refused = User(), User(), User()
        for user in (first, waiting, refused):
            pool.acquire(user)
        assert isinstance(refused.refusal, Unavailable)
        await first.served()
        finish(first)
        assert waiting.connection is first.connection


async def test_a_fresh_connection_is_made_though_idle_ones_fill_the_pool() -> None:
    host = Host()
    async with pool_of(host, upstream_connections=2) as pool:
        users = [await use(pool), await use(pool)]
        for user in users:
            finish(user)
        anew = User()
        pool.acquire(anew, fresh=True)
        assert not (await anew.served()).reused
        await eventually(lambda: len(pool._open) == 2)


async def test_a_dead_peer_is_noticed_by_the_kernel() -> None:
    host = Host()
    async with pool_of(host) as pool:
        user = await use(pool)
        assert user.connection is not None and user.connection._transport is not None
        opened = user.connection._transport.get_extra_info("socket")
        assert opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 20_000
