"""The end of a worker's connections: nobody who has asked goes without an answer.

Owns the order and the bounds of it; what one connection does is `front_door`'s. Whether it is
the end of the service or a successor serves on the same listening socket makes no difference.

Theory of operation: what waits to be accepted is accepted, then the listener is closed. Until
the drain's deadline requests are served as ever, but each connection's next answer says that
it closes; one that stays idle for `drain_idle_seconds` is closed. At the deadline what is
left is cut, with an error the client can read, and its sender is given a moment to read it.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from accounting.contract.errors import Unavailable
from proxy.front_door import door

if TYPE_CHECKING:
    from proxy.services import Services

_LOOK_SECONDS = 0.02
_PARTING_SECONDS = 3.0  # longer than a connection lingers
_WAITING_AT_MOST = 4096  # the backlog of a listener


async def drain(services: "Services", listener: socket.socket, server: asyncio.Server) -> None:
    """Accept no more, and see every connection to its end, within the drain's deadline."""
    services.draining = True
    for connection in list(services.connections):
        connection.drain()
    waiting = _accepted(listener)
    server.close()
    for one in waiting:
        await services.loop.connect_accepted_socket(lambda: door(services), one)
    await _until(lambda: not _busy(services), services.settings.drain_timeout_seconds)
    for connection in list(services.connections):
        connection.stop(Unavailable("The service is restarting."))
    await _until(lambda: not services.connections, _PARTING_SECONDS)
    for connection in list(services.connections):
        connection.cut()
    await services.aiohttp_lane.stop()


def _accepted(listener: socket.socket) -> list[socket.socket]:
    """The connections made but not yet accepted: a closed listener would reset them."""
    found: list[socket.socket] = []
    while len(found) < _WAITING_AT_MOST:
        try:
            one, _ = listener.accept()
        except ConnectionAbortedError:  # its client has left meanwhile
            continue
        except OSError:  # none waits any more, or there is no descriptor left for one
            break
        one.setblocking(False)
        found.append(one)
    return found


def _busy(services: "Services") -> bool:
    return bool(services.connections or services.exchanges or services.aiohttp_lane.busy)


async def _until(done: Callable[[], bool], seconds: float) -> None:
    """Wait for it, at most so long."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not done() and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(_LOOK_SECONDS)
