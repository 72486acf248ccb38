"""`/healthz` and `/metrics` of one accounting process, on its own private address.

Owns the names of accounting's metrics; what is counted is in `counters.py`, what audits found
in `auditor.py`. Money does not wait for its metrics: an address that is taken, by another
accounting process of the host for one, is tried again until it is free.
"""

import asyncio
import logging
from collections.abc import Iterator

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from accounting.auditor import Audits
from accounting.contract.settings import Address
from accounting.counters import Counters

_AGAIN_SECONDS = 5.0
_GAUGES = {
    "owned_shards": "Shards this process posts.",
    "lag_ms": "From an entry's arrival on the stream to its commit, of the last batch, ms.",
}
_COUNTERS = {
    "batches": "Batches posted.",
    "entries": "Stream entries posted.",
    "events": "Usage events recorded.",
    "duplicates": "Usage events delivered again, and recognised.",
    "quarantined": "Usage events that could not be posted: each needs somebody to look.",
    "refused": "Tries of an entry that Postgres would not take.",
    "outages": "Times that a store was lost.",
    "deltas": "Movements of credits brought to Redis.",
    "expired_ucr": "Credits forfeited by expiry, in micro-credits.",
    "rebuilds": "Times that Redis was filled from the ledger.",
}
_log = logging.getLogger("tollgate.accounting")


class Figures(Collector):
    """What a process has counted and what its last audit found, as metrics."""

    def __init__(self, counters: Counters, audits: Audits) -> None:
        self._counters, self._audits = counters, audits

    def collect(self) -> Iterator[Metric]:
        for name, value in msgspec.structs.asdict(self._counters).items():
            if name in _GAUGES:
                yield GaugeMetricFamily(f"tollgate_accounting_{name}", _GAUGES[name], value)
            else:
                text = _COUNTERS.get(name, name.replace("_", " "))
                yield CounterMetricFamily(f"tollgate_accounting_{name}", text, value)
        yield from self._audit()

    def _audit(self) -> Iterator[Metric]:
        audits = self._audits
        drift = GaugeMetricFamily(
            "tollgate_audit_drift", "What drifted at the last audit.", labels=["invariant"]
        )
        checked = GaugeMetricFamily(
            "tollgate_audit_checked", "What the last audit looked at.", labels=["invariant"]
        )
        for finding in audits.findings:
            drift.add_metric([finding.name], finding.drifted)
            checked.add_metric([finding.name], finding.checked)
        yield drift
        yield checked
        yield GaugeMetricFamily(
            "tollgate_audit_at_seconds",
            "When this process last finished an audit, seconds since the epoch; 0: never.",
            audits.finished_at,
        )
        yield GaugeMetricFamily(
            "tollgate_audit_took_seconds", "How long the last audit took.", audits.took_seconds
        )


class MetricsServer:
    """Serves until its task is cancelled. `port` is 0 until it listens."""

    def __init__(self, counters: Counters, audits: Audits, address: Address) -> None:
        self._address = address
        self._registry = CollectorRegistry()
        self._registry.register(Figures(counters, audits))
        self.port = 0

    def __repr__(self) -> str:
        return f"<MetricsServer {self._address} port={self.port}>"

    async def run(self) -> None:
        application = web.Application()
        application.router.add_get("/healthz", self._healthz)
        application.router.add_get("/metrics", self._metrics)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        try:
            await self._listen(runner)
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()

    async def _listen(self, runner: web.AppRunner) -> None:
        said = False
        while not runner.addresses:
            try:
                await web.TCPSite(runner, self._address.host, self._address.port).start()
            except OSError as error:
                if not said:
                    _log.warning("no metrics yet: %s: %s", self._address, error.strerror)
                    said = True
                await asyncio.sleep(_AGAIN_SECONDS)
        self.port = runner.addresses[0][1]

    async def _healthz(self, _request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _metrics(self, _request: web.Request) -> web.Response:
        headers = {"content-type": CONTENT_TYPE_LATEST}
        return web.Response(body=generate_latest(self._registry), headers=headers)
