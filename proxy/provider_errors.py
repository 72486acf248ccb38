"""What a provider's refusal means to a client: status and text, never a secret or an address.

Pure. What the client did wrong keeps its status and words; what we or the provider did
wrong becomes 429, 502, 503 or 504.
"""

import msgspec
from msgspec import Struct

from accounting.contract.catalogue import Provider, Target
from accounting.contract.errors import (
    Failure,
    ProviderFailed,
    ProviderLimited,
    ProviderMisconfigured,
    ProviderRefused,
)

_TEXT_LIMIT = 500
_CODE_LIMIT = 100
_LONGEST_RETRY_SECONDS = 3600
CLIENTS_FAULT = (400, 413, 415, 422)
_OUR_FAULT = (401, 402, 403, 404, 405)


class _Error(Struct):
    message: str | None = None
    code: object = None
    param: object = None


class _Body(Struct):
    error: _Error | None = None


_decoder = msgspec.json.Decoder(_Body)


def failure_of(status: int, body: bytes, retry_after: bytes, target: Target) -> Failure:
    """The Failure for a provider's answer that is not 200."""
    if status in CLIENTS_FAULT:
        error = _read(body)
        message = scrubbed(error.message or "The provider refused the request.", target.provider)
        code, param = _word(error.code, target.provider), _word(error.param, target.provider)
        return ProviderRefused(status, message, code, param)
    seconds = _seconds(retry_after)
    if status == 429:
        return ProviderLimited(retry_after_seconds=seconds)
    if status in _OUR_FAULT:
        return ProviderMisconfigured()
    return ProviderFailed(retry_after_seconds=seconds)


def _seconds(retry_after: bytes) -> int | None:
    """Whole seconds a client may be told to wait; None for dates, nonsense and the far future."""
    if not retry_after.isdigit() or len(retry_after) > 9:
        return None
    seconds = int(retry_after)
    return seconds if seconds <= _LONGEST_RETRY_SECONDS else None


def _word(value: object, provider: Provider) -> str | None:
    return scrubbed(value, provider)[:_CODE_LIMIT] if isinstance(value, str) else None


def scrubbed(text: str, provider: Provider) -> str:
    """A provider's words, short, without its key or address."""
    secret = provider.api_key.reveal()
    if secret:
        text = text.replace(secret, "[hidden]")
        text = text.replace(secret[-4:], "[hidden]") if len(secret) >= 12 else text
    for address in (f"{provider.host}:{provider.port}", provider.host):
        text = text.replace(address, "[provider]")
    return text[:_TEXT_LIMIT]


def _read(body: bytes) -> _Error:
    try:
        return _decoder.decode(body).error or _Error()
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return _Error()
