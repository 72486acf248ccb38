"""The scenes of the proxy's tests serve here, too."""

from tests.proxy.harness import proxy, start
from tests.proxy.host import host, seeds

__all__ = ["host", "proxy", "seeds", "start"]
