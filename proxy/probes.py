"""`/healthz`, `/readyz` and `/metrics` of one host, on the private port.

`/healthz`: the supervisor runs. `/readyz`: every worker serves and may admit. `/metrics`:
Prometheus text, summed over the workers.
"""

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from accounting.contract.settings import Address
from proxy.metrics import HostMetrics


class Probes:
    """A small aiohttp server beside the workers."""

    def __init__(self, host_metrics: HostMetrics, workers: int) -> None:
        self._metrics = host_metrics
        self._workers = workers
        self._registry = CollectorRegistry()
        self._registry.register(host_metrics)
        application = web.Application()
        application.router.add_get("/healthz", self._healthz)
        application.router.add_get("/readyz", self._readyz)
        application.router.add_get("/metrics", self._scrape)
        self._runner = web.AppRunner(application, access_log=None)

    async def start(self, address: Address) -> None:
        """Raises OSError when the address cannot be had."""
        await self._runner.setup()
        await web.TCPSite(self._runner, address.host, address.port).start()

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _healthz(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _readyz(self, request: web.Request) -> web.Response:
        serving = self._metrics.total("tollgate_workers_ready")
        admitting = self._metrics.total("tollgate_gate_open")
        ready = serving >= self._workers and admitting >= self._workers
        facts = {"ready": ready, "workers": serving, "admitting": admitting}
        return web.json_response(facts, status=200 if ready else 503)

    async def _scrape(self, request: web.Request) -> web.Response:
        return web.Response(
            body=generate_latest(self._registry), headers={"content-type": CONTENT_TYPE_LATEST}
        )
