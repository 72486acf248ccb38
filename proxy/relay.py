"""[7] A provider's answer as it comes in: passed on as a stream, or gathered whole.

Owns the answer's state: its status, its scanner or its pieces, and their bounds. Refuses by
raising the Failure that says what was wrong with the answer.
"""

from accounting.contract.catalogue import Target
from accounting.contract.errors import Failure, ProviderFailed, ProviderGarbled
from accounting.contract.settings import Settings
from proxy.provider_errors import failure_of, scrubbed
from proxy.request_head import ChatHead
from proxy.sse import EventTooLong
from proxy.usage_scanner import StreamScanner

_ERROR_BODY_LIMIT = 65_536


class Relay:
    """One answer of one target. `status` is 0 until its head has come."""

    __slots__ = ("_limit", "_pieces", "_received", "_retry_after", "_target", "scanner", "status")

    def __init__(self, target: Target) -> None:
        self._target = target
        self._limit = _ERROR_BODY_LIMIT
        self._pieces: list[bytes] = []
        self._received = 0
        self._retry_after = b""
        self.scanner: StreamScanner | None = None
        self.status = 0

    def start(
        self, status: int, headers: dict[bytes, bytes], head: ChatHead, settings: Settings
    ) -> None:
        """The answer's head. Raises ProviderGarbled for a 200 that is not what was asked."""
        self.status = status
        if status != 200:
            self._retry_after = headers.get(b"retry-after", b"")
            return
        self._limit = settings.answer_limit_bytes
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise ProviderGarbled
        if head.stream:
            if not headers.get(b"content-type", b"").lower().startswith(b"text/event-stream"):
                raise ProviderGarbled
            self.scanner = StreamScanner(settings.event_limit_bytes, not head.wants_usage)

    def gather(self, data: bytes) -> None:
        """More of an answer that is not a stream. Raises ProviderGarbled beyond its bound."""
        self._pieces.append(data)
        self._received += len(data)
        if self._received > self._limit:
            raise ProviderGarbled("The provider's answer is too large.")

    def pass_on(self, scanner: StreamScanner, data: bytes) -> bytes:
        """What of a stream's bytes goes to the client now. Raises ProviderGarbled."""
        try:
            return scanner.pass_on(data)
        except EventTooLong:
            raise ProviderGarbled("An event of the provider is too large.") from None

    @property
    def body(self) -> bytes:
        return self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)

    @property
    def answer_bytes(self) -> int:
        return self._received if self.scanner is None else self.scanner.relayed_bytes

    def failure(self) -> Failure:
        """What an answer that is not 200, whole by now, means to the client."""
        return failure_of(self.status, self.body, self._retry_after, self._target)

    def in_band_failure(self, message: str) -> Failure:
        """What an error event within a stream means to the client."""
        return ProviderFailed(scrubbed(message, self._target.provider))
