"""What every exchange of a worker uses: built once by `worker`, passed to each."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from accounting.contract.settings import Settings
from proxy.journal import Journal
from proxy.keys import Keys
from proxy.leases import Leases
from proxy.metrics import Counters
from proxy.request_ids import RequestIds
from proxy.routing import Routing
from proxy.settlement import Settlement
from proxy.turn_end import TurnEnd
from proxy.upstream import Upstreams

if TYPE_CHECKING:
    from proxy.aiohttp_lane import AiohttpLane
    from proxy.exchange import Exchange
    from proxy.front_door import FrontDoor


class Services:
    """The steps of an exchange, and the two sets that a sweep and a drain go through."""

    __slots__ = (
        "aiohttp_lane", "connections", "counters", "draining", "exchanges", "gate_open", "journal",
        "keys", "leases", "loop", "now", "request_ids", "routing", "settings", "settlement",
        "turn_end", "upstreams",
    )  # fmt: skip

    def __init__(
        self,
        *,
        settings: Settings,
        loop: asyncio.AbstractEventLoop,
        now: Callable[[], float],
        request_ids: RequestIds,
        keys: Keys,
        leases: Leases,
        routing: Routing,
        upstreams: Upstreams,
        journal: Journal,
        settlement: Settlement,
        counters: Counters,
        aiohttp_lane: "AiohttpLane",
    ) -> None:
        self.settings = settings
        self.loop = loop
        self.turn_end = TurnEnd(loop)
        self.now = now
        self.request_ids = request_ids
        self.keys = keys
        self.leases = leases
        self.routing = routing
        self.upstreams = upstreams
        self.journal = journal
        self.settlement = settlement
        self.counters = counters
        self.aiohttp_lane = aiohttp_lane
        self.connections: set[FrontDoor] = set()
        self.exchanges: set[Exchange] = set()
        self.draining = False  # the next answer of each connection is its last
        self.gate_open = False  # Redis holds what the ledger says: it has its epoch
