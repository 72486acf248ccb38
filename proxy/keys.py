"""[3] Whom a secret stands for: digest to key record, through a bounded cache.

Owns the cache. A record says who; whether the key may still do anything is decided at
admission, against the rules in Redis, so a cached record never lets a revoked key pass.
"""

import asyncio
import hashlib
from collections.abc import Callable

import msgspec

from accounting.contract import keyspace
from accounting.contract.errors import Failure, InvalidKey, Unavailable
from accounting.contract.keyspace import KeyRecord
from proxy.redis_pipe import RedisPipe, pack

OnKey = Callable[[KeyRecord | Failure], None]
_BEARER = b"bearer "
_SECRET_LENGTH = 47


def digest_of(authorization: bytes | None) -> bytes:
    """The digest of the secret in an Authorization header; empty if there can be none."""
    if authorization is None or authorization[:7].lower() != _BEARER:
        return b""
    secret = authorization[7:].strip()
    if len(secret) != _SECRET_LENGTH or not secret.startswith(b"inf_"):
        return b""
    return hashlib.sha256(secret).digest()


class Keys:
    """Key records by digest. At most `entries` are kept, each for `seconds`."""

    def __init__(
        self, pipe: RedisPipe, entries: int, seconds: float, now: Callable[[], float]
    ) -> None:
        self._pipe = pipe
        self._entries = entries
        self._seconds = seconds
        self._now = now
        self._records: dict[bytes, tuple[float, KeyRecord]] = {}
        self._asked: dict[bytes, list[OnKey]] = {}

    def __repr__(self) -> str:
        return f"Keys(records={len(self._records)}, asked={len(self._asked)})"

    def find(self, authorization: bytes | None, on_key: OnKey, fresh: bool = False) -> bytes | None:
        """Call `on_key` with the record or a Failure, at once when it is cached.

        `fresh`: ask Redis in any case, where no admission follows that would notice a change.

        Returns the digest, to be forgotten when its record proves stale.
        """
        digest = digest_of(authorization)
        self.look_up(digest, on_key, fresh)
        return digest or None

    def look_up(self, digest: bytes, on_key: OnKey, fresh: bool = False) -> None:
        """The same, for a `digest_of` known from before."""
        found = None if fresh else self._records.get(digest)
        if found is not None and found[0] > self._now():
            on_key(found[1])
        elif digest:
            self._ask(digest, on_key)
        else:
            on_key(InvalidKey())

    def forget(self, digest: bytes) -> None:
        self._records.pop(digest, None)

    def _ask(self, digest: bytes, on_key: OnKey) -> None:
        waiting = self._asked.get(digest)
        if waiting is not None:
            waiting.append(on_key)
            return
        self._asked[digest] = [on_key]
        command = pack(("GET", keyspace.digest_key(digest.hex())))
        self._pipe.send(command, lambda reply: self._answered(digest, reply))

    def _answered(self, digest: bytes, reply: object) -> None:
        if isinstance(reply, bytes):
            self._tell(digest, self._keep(digest, reply))
        elif reply is None:  # nobody's key, or a Redis that lost them all
            command = pack(("EXISTS", keyspace.EPOCH))
            self._pipe.send(command, lambda filled: self._unknown(digest, filled))
        else:
            self._tell(digest, Unavailable())

    def _unknown(self, digest: bytes, filled: object) -> None:
        self._tell(digest, InvalidKey() if filled == 1 else Unavailable())

    def _keep(self, digest: bytes, packed: bytes) -> KeyRecord | Failure:
        try:
            record = keyspace.key_record_decoder.decode(packed)
        except msgspec.DecodeError:
            return Unavailable()
        self._records.pop(digest, None)  # an expired one, so that the new one is the youngest
        if len(self._records) >= self._entries:
            del self._records[next(iter(self._records))]
        self._records[digest] = (self._now() + self._seconds, record)
        return record

    def _tell(self, digest: bytes, found: KeyRecord | Failure) -> None:
        for on_key in self._asked.pop(digest):
            try:
                on_key(found)
            except Exception as error:  # one exchange's bug must not cost the others an answer
                loop = asyncio.get_running_loop()
                loop.call_exception_handler({"message": "on_key", "exception": error})
