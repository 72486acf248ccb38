"""[4] Model to targets: where a request may be served, in order, and what it sends there.

Owns the catalogue in force; a reload swaps it whole, and exchanges under way keep theirs.
"""

from accounting.contract.catalogue import Catalogue, Model, Target
from accounting.contract.errors import ModelNotFound


class Routing:
    """The catalogue in force, and each target's request head up to the parts that vary."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self._heads: dict[tuple[str, str], bytes] = {}

    def replace(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self._heads = {}

    def model(self, name: str) -> Model:
        """Raises ModelNotFound."""
        model = self.catalogue.models.get(name)
        if model is None:
            raise ModelNotFound(f"The model `{name[:100]}` does not exist here.", param="model")
        return model

    def request_head(self, target: Target, path: str) -> bytes:
        """The upstream request head for `path`, less its length and request id."""
        known = self._heads.get((str(target.provider.name), path))
        if known is None:
            known = self._heads[target.provider.name, path] = _head(target, path)
        return known


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
