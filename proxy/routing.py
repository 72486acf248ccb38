"""[4] Model to targets: where a request may be served, in order, and what it sends there.

Owns the catalogue in force. Another one comes with another worker.

Theory of operation: each target of a model is a `Stop`: the pool that leads there, the request
head it expects, its cool-down. An exchange has a `Route` over them and is at one of them at a
time. It passes over those that cool, unless all do: then it tries them anyway, those first
that may recover soonest. What becomes of each attempt is told to the target's cool-down.
"""

from collections.abc import Callable, Iterator
from functools import partial

import msgspec
from msgspec import Raw

from accounting.contract.catalogue import Catalogue, Model, Target
from accounting.contract.errors import Failure, ModelNotFound, ProviderRefused, Unavailable
from proxy.cooldown import ANYWAY, PROBE, REFUSED, SERVING, Cooldown, CooldownRules
from proxy.upstream import ProviderPool, Upstreams

_encode = msgspec.msgpack.Encoder().encode

Changed = Callable[[str, float], None]  # target, seconds that it cools; 0 = it serves again


class Stop:
    """One target of a model, its place in the model's order, and what it takes to ask it."""

    __slots__ = (
        "_heads",
        "cooldown",
        "depth",
        "model_name",
        "name",
        "packed_price",
        "pool",
        "target",
    )

    def __init__(self, model: Model, depth: int, pool: ProviderPool, cooldown: Cooldown) -> None:
        self.target = target = model.targets[depth]
        self.name = str(target)
        self.model_name = Raw(msgspec.json.encode(target.model))  # as a body says it
        self.packed_price = Raw(_encode(model.price))  # for the journal, 0.4 µs cheaper than anew
        self.depth = depth
        self.pool = pool
        self.cooldown = cooldown
        self._heads: dict[str, bytes] = {}

    def __repr__(self) -> str:
        return f"Stop({self.target}, {self.cooldown!r})"

    def request_head(self, path: str, request_id: bytes, length: int) -> bytes:
        """The head of a request to `path` of the provider, for a body of `length` bytes."""
        known = self._heads.get(path)
        if known is None:
            known = self._heads[path] = _head(self.target, path)
        return b"%bx-request-id: %b\r\ncontent-length: %d\r\n\r\n" % (known, request_id, length)


class Route:
    """One exchange's way from target to target. See the module.

    `stop` is the present target: the first one before any was tried. Every attempt ends with
    one of `succeeded`, `failed` and `forgone`; the last is harmless after another.
    """

    __slots__ = ("_at_worst", "_footing", "_next", "_stops", "model", "stop")

    def __init__(self, model: Model, stops: tuple[Stop, ...]) -> None:
        self.model = model
        self.stop = stops[0]
        self._stops = stops
        self._next = 0
        self._footing = REFUSED  # until the first attempt
        self._at_worst = REFUSED

    def __repr__(self) -> str:
        return f"Route({self.stop.target}, depth={self.stop.depth})"

    def advance(self, now: float) -> bool:
        """Go to the next target that may be tried. False: there is none, `stop` stays."""
        stops = self._stops
        while self._next < len(stops):
            stop = stops[self._next]
            self._next += 1
            footing = stop.cooldown.admit(now) or self._at_worst
            if footing:
                self._footing = footing
                self.stop = stop
                return True
        if self._footing:
            return False
        self._stops = tuple(sorted(stops, key=_recovery))
        self._next, self._at_worst = 0, ANYWAY
        return self.advance(now)

    def succeeded(self, now: float) -> None:
        """The present target serves, or answered in order."""
        if self._footing == SERVING:
            self.stop.cooldown.succeeded(now)
        else:
            self.recovered(now)

    def recovered(self, now: float) -> None:
        """The present target, if it was cooling, has begun to answer."""
        if self._footing != SERVING:
            self._footing = SERVING
            self.stop.cooldown.recovered(now)

    def failed(self, failure: Failure, now: float) -> None:
        """The attempt failed. What the client or we did wrong does not count against it."""
        if isinstance(failure, ProviderRefused):
            self.succeeded(now)
        elif isinstance(failure, Unavailable):
            self.forgone()
        else:
            seconds = failure.retry_after_seconds if failure.status == 429 else 0
            self.stop.cooldown.failed(now, self._footing == PROBE, seconds or 0)
            self._footing = SERVING

    def forgone(self) -> None:
        """The attempt ended before it could tell anything of the target."""
        if self._footing == PROBE:
            self._footing = SERVING
            self.stop.cooldown.forgone()


def _recovery(stop: Stop) -> float:
    return stop.cooldown.until


class Routing:
    """The catalogue in force, and the stops of each of its models."""

    def __init__(
        self, catalogue: Catalogue, upstreams: Upstreams, rules: CooldownRules, changed: Changed
    ) -> None:
        """Raises CatalogueError for a provider that cannot be used."""
        self.catalogue = catalogue
        self._rules = rules
        self._changed = changed
        self._cooldowns: dict[tuple[str, str], Cooldown] = {}
        upstreams.add(catalogue.providers.values())
        self._routes = {
            name: (model, tuple(self._stops(model, upstreams.pools)))
            for name, model in catalogue.models.items()
        }

    def __repr__(self) -> str:
        return f"Routing({len(self._routes)} models, cooling={self.cooling})"

    def model(self, name: str) -> Model:
        """Raises ModelNotFound."""
        return self._route(name)[0]

    def route(self, name: str) -> Route:
        """A new way to be served. Raises ModelNotFound."""
        return Route(*self._route(name))

    @property
    def cooling(self) -> int:
        """How many targets are being passed over."""
        return sum(cooldown.cooling for cooldown in self._cooldowns.values())

    def _route(self, name: str) -> tuple[Model, tuple[Stop, ...]]:
        found = self._routes.get(name)
        if found is None:
            raise ModelNotFound(f"The model `{name[:100]}` does not exist here.", param="model")
        return found

    def _stops(self, model: Model, pools: dict[str, ProviderPool]) -> Iterator[Stop]:
        for depth, target in enumerate(model.targets):
            where = (target.provider.name, target.model)
            cooldown = self._cooldowns.get(where)
            if cooldown is None:
                cooldown = Cooldown(self._rules, partial(self._changed, str(target)))
                self._cooldowns[where] = cooldown
            yield Stop(model, depth, pools[target.provider.name], cooldown)


def _head(target: Target, path: str) -> bytes:
    provider = target.provider
    default_port = 443 if provider.tls else 80
    host = f"[{provider.host}]" if ":" in provider.host else provider.host
    host = host if provider.port == default_port else f"{host}:{provider.port}"
    lines = [
        f"POST {provider.path}{path} HTTP/1.1",
        f"host: {host}",
        "content-type: application/json",
        "accept: application/json, text/event-stream",
        "accept-encoding: identity",
        "user-agent: tollgate",
    ]
    if provider.api_key:
        lines.append(f"authorization: Bearer {provider.api_key.reveal()}")
    return ("\r\n".join(lines) + "\r\n").encode("ascii")
