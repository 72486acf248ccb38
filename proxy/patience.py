"""How long an exchange may take: silence of the provider, and the whole; no I/O.

Owns the clock of one exchange. Looked at about twice a second by the worker's sweep, so a
chunk costs no more than setting a flag.
"""

from accounting.contract.catalogue import Provider
from accounting.contract.settings import Settings


class Patience:
    """`heard`: set at every sign of life; `paused`: the client reads slowly, not our wait."""

    __slots__ = ("heard", "paused", "quiet_since", "started_at")

    def __init__(self, started_at: float) -> None:
        self.started_at = self.quiet_since = started_at
        self.heard = self.paused = False

    def exhausted(self, now: float, settings: Settings, provider: Provider) -> bool:
        """Whether the exchange has lasted longer than it may in total."""
        limit = provider.total_timeout_seconds or settings.total_timeout_seconds
        return now - self.started_at > limit

    def silent(self, now: float, settings: Settings, provider: Provider, answering: bool) -> bool:
        """Whether the provider has been silent for too long, before or within its answer."""
        if self.heard:
            self.heard = False
            self.quiet_since = now
        if self.paused:
            return False
        if answering:
            limit = provider.chunk_timeout_seconds or settings.chunk_timeout_seconds
        else:
            limit = provider.first_byte_timeout_seconds or settings.first_byte_timeout_seconds
        return now - self.quiet_since > limit
