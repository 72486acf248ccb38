"""What every exchange of a worker uses: built once by `worker`, passed to each."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from accounting.contract.settings import Settings
from proxy.journal import Journal
from proxy.keys import Keys
from proxy.leases import Leases
from proxy.metrics import Counters
from proxy.request_ids import RequestIds
from proxy.routing import Routing
from proxy.settlement import Settlement
from proxy.upstream import Upstreams

if TYPE_CHECKING:
    from proxy.aiohttp_lane import AiohttpLane
    from proxy.exchange import Exchange
    from proxy.front_door import FrontDoor


@dataclass(slots=True)
class Services:
    """The steps of an exchange, and the two sets that a sweep and a drain go through."""

    settings: Settings
    loop: asyncio.AbstractEventLoop
    now: Callable[[], float]
    request_ids: RequestIds
    keys: Keys
    leases: Leases
    routing: Routing
    upstreams: Upstreams
    journal: Journal
    settlement: Settlement
    counters: Counters
    aiohttp_lane: "AiohttpLane"
    connections: "set[FrontDoor]" = field(default_factory=set)
    exchanges: "set[Exchange]" = field(default_factory=set)
    draining: bool = False  # the next answer of each connection is its last
    gate_open: bool = False  # Redis holds what the ledger says: it has its epoch
