"""[6] TLS to providers: certificates and names are verified, sessions are taken up again.

Theory of operation: asyncio and uvloop offer no way to name a session, but both make their
TLS object by calling `wrap_bio` of the context they were given; this context adds the session
there. TLS 1.3 sends tickets after the handshake, so a session is remembered when the first
answer of a connection has ended. A name is all that a session is remembered by: a resumed
session is one whose certificate was verified for that name with these authorities.
"""

import ssl
from typing import Any

from accounting.contract.catalogue import CatalogueError, Provider


class ResumingContext(ssl.SSLContext):
    """A verifying client context which offers a name the last session it had with it."""

    _sessions: dict[str | bytes | None, ssl.SSLSession]

    def wrap_bio(self, *arguments: Any, **named: Any) -> ssl.SSLObject:
        named["session"] = self._sessions.get(named.get("server_hostname"))
        return super().wrap_bio(*arguments, **named)

    def remember(self, connection: ssl.SSLObject) -> None:
        session = connection.session
        if session is not None:
            self._sessions[connection.server_hostname] = session

    def forget(self, name: str) -> None:
        """After a failed handshake: try the next one from scratch."""
        self._sessions.pop(name, None)


def context_of(provider: Provider) -> ResumingContext:
    """Trusts the provider's `ca_file`, else the system's authorities. Raises CatalogueError."""
    context = ResumingContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies certificate and name
    context._sessions = {}
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    if not provider.ca_file:
        context.load_default_certs()
        return context
    try:
        context.load_verify_locations(provider.ca_file)
    except OSError as error:
        where = f"catalogue: provider {provider.name!r}: ca_file {provider.ca_file}"
        raise CatalogueError(f"{where}: {error.strerror or error}") from None
    return context


def reason_of(error: ssl.SSLError) -> str:
    """Why a handshake failed, in OpenSSL's words."""
    return str(getattr(error, "verify_message", "") or error.reason or error)
