"""What a request of a workspace of its own costs Redis, by how busy Redis is.

    python -m benchmarks.redis_cost [--requests N] [RATE …]

Owns the way of such requests through a Redis of its own, without proxy, accounting or HTTP:
key record, lease, settle, with the proxy's encodings, the append-only file on. Requests arrive
at random moments at each RATE per second; what has arrived goes in one write, settles are
gathered as long as the proxy gathers them. RATE 0: `TURN` of them at a time, one turn after
the other, as a Redis that is never idle is asked. Every workspace is used once.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import hiredis
import msgspec

from accounting.contract import keyspace
from accounting.contract.figures import pack_figures
from accounting.contract.identifiers import new_id
from accounting.contract.keyspace import ACTIVE, LIVE, KeyRecord, KeyRules
from accounting.contract.scripts import SCRIPTS
from accounting.contract.settings import Settings
from accounting.embedded import Server, start_redis
from benchmarks.kernel import cpu_seconds, pin_tree
from benchmarks.micro import Typical
from proxy.key_lease import KeyLease
from proxy.settle_record import Settle
from proxy.settlement import batch_command

TURN = 32
RATES = (1500.0, 5000.0, 10_000.0, 0.0)
BOOT = new_id("boot")
BALANCE_UCR = 10**12
RULES = KeyRules(1, LIVE, 0, 60_000, 10**9, 10**9, 1000, BALANCE_UCR)
pack = hiredis.pack_command
encode = msgspec.msgpack.encode


class Cold(NamedTuple):
    """One request: its commands, and what ends it."""

    shard: int
    setting_up: list[bytes]
    find: bytes
    lease: bytes
    settle: Settle


class Connection:
    """Commands out in one write, replies counted as they come."""

    def __init__(self, server: Server) -> None:
        url = urlsplit(server.url)
        self._socket = socket.create_connection((url.hostname, url.port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = hiredis.Reader()
        self.waiting = 0
        self.send([pack(("AUTH", url.password))])
        self.send([pack(("SCRIPT", "LOAD", one.source)) for one in SCRIPTS.values()])
        self.receive()

    def send(self, commands: list[bytes]) -> None:
        """All of them at once."""
        if commands:
            self._socket.sendall(b"".join(commands))
            self.waiting += len(commands)

    def receive(self, at_most_seconds: float | None = None) -> None:
        """Wait for all replies; or for some, no longer than that."""
        self._socket.settimeout(at_most_seconds)
        while self.waiting:
            try:
                self._reader.feed(self._socket.recv(1 << 20))
            except (TimeoutError, BlockingIOError):
                break
            while (reply := self._reader.gets()) is not False:
                if isinstance(reply, Exception):
                    raise reply
                self.waiting -= 1
            if at_most_seconds is not None:
                break
        self._socket.settimeout(None)


def made(requests: int) -> list[Cold]:
    """Requests of as many workspaces."""
    typical = Typical()
    return [make(typical.settle) for _ in range(requests)]


def make(like: Settle) -> Cold:
    """One request of a workspace of its own, that holds and costs what `like` does."""
    record = KeyRecord(1, new_id("key"), new_id("ws"), "cold", [], [])
    name = keyspace.workspace_key(record.workspace_id)
    digest = keyspace.digest_key(keyspace.digest_of(record.key_id))
    figures = pack_figures(1, *[0] * 10, like.credits_ucr, like.tokens_held, 1)
    words: list[tuple[Any, ...]] = [
        ("EVALSHA", SCRIPTS["put_workspace"].digest, 1, name, ACTIVE),
        ("EVALSHA", SCRIPTS["put_key"].digest, 1, name, record.key_id, encode(RULES)),
        ("EVALSHA", SCRIPTS["credit"].digest, 1, name, 1, BALANCE_UCR),
        ("SET", digest, encode(record)),
    ]
    lease = KeyLease(record, BOOT)
    return Cold(
        lease.shard,
        [pack(one) for one in words],
        pack(("GET", digest)),
        pack(("EVALSHA", SCRIPTS["lease"].digest, 2, *lease.field_words, figures)),
        msgspec.structs.replace(like, workspace_id=record.workspace_id, key_id=record.key_id),
    )


class Settling:
    """Settles as batches of their shards, numbered."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}

    def commands(self, ended: list[Cold]) -> list[bytes]:
        """One call per shard."""
        shards: dict[int, list[Settle]] = {}
        for one in ended:
            shards.setdefault(one.shard, []).append(one.settle)
        return [self._batch(shard, settles) for shard, settles in shards.items()]

    def _batch(self, shard: int, settles: list[Settle]) -> bytes:
        number = self._numbers[shard] = self._numbers.get(shard, 0) + 1
        return batch_command(shard, BOOT, number, settles)


def at_full_speed(connection: Connection, requests: list[Cold], settling: Settling) -> None:
    """One turn after the other: settles of the last but one, leases of the last, keys of this."""
    turns = [requests[at : at + TURN] for at in range(0, len(requests), TURN)]
    for new, found, ended in zip([*turns, [], []], [[], *turns, []], [[], [], *turns], strict=True):
        finds, leases = [one.find for one in new], [one.lease for one in found]
        connection.send([*finds, *leases, *settling.commands(ended)])
        connection.receive()


def arrivals(requests: list[Cold], rate: float) -> Iterator[tuple[float, Cold]]:
    """Each with its moment, from now on."""
    at, chance = time.perf_counter(), random.Random(7)
    for one in requests:
        at += chance.expovariate(rate)
        yield at, one


def at_rate(connection: Connection, requests: list[Cold], settling: Settling, rate: float) -> None:
    """Open loop: each step of a request follows the step before by one look at the socket."""
    gather = Settings().settle_interval_seconds
    coming = list(reversed(list(arrivals(requests, rate))))
    found: list[Cold] = []
    ended: list[Cold] = []
    settle_at = 0.0
    while coming or found or ended:
        now = time.perf_counter()
        new = []
        while coming and coming[-1][0] <= now:
            new.append(coming.pop()[1])
        commands = [one.find for one in new] + [one.lease for one in found]
        if ended and now >= settle_at:
            commands += settling.commands(ended)
            ended = []
        if found and not ended:
            settle_at = now + gather
        ended += found
        connection.send(commands)
        connection.receive(0.0001)
        if not commands:
            time.sleep(0.0001)
        found = new
    connection.receive()


def measure(rate: float, count: int) -> float:
    """µs of Redis's CPU per request."""
    requests = made(count)
    with tempfile.TemporaryDirectory() as folder:
        server = start_redis(Path(folder))
        try:
            cores = sorted(os.sched_getaffinity(0))
            pin_tree([server.pid], cores[0])
            connection, settling = Connection(server), Settling()
            for at in range(0, count, TURN):
                turn = requests[at : at + TURN]
                connection.send([command for one in turn for command in one.setting_up])
                connection.receive()
            random.Random(7).shuffle(requests)
            warmup = count // 10
            at_full_speed(connection, requests[:warmup], settling)
            before = cpu_seconds([server.pid])
            if rate:
                at_rate(connection, requests[warmup:], settling, rate)
            else:
                at_full_speed(connection, requests[warmup:], settling)
            return (cpu_seconds([server.pid]) - before) / (count - warmup) * 1e6
        finally:
            server.stop()


def main() -> None:
    """Print µs per request for each rate."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.redis_cost")
    parser.add_argument("rates", nargs="*", type=float, default=RATES, metavar="RATE")
    parser.add_argument("--requests", type=int, default=10_000)
    options = parser.parse_args()
    print("| requests/s | redis µs per cold request |\n| --- | --- |")
    for rate in options.rates:
        cost = measure(rate, options.requests)
        print(f"| {f'{rate:,.0f}' if rate else 'as many as go'} | {cost:.1f} |", flush=True)


if __name__ == "__main__":
    main()
