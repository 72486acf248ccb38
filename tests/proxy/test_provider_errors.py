"""A provider's refusal as a client may see it: the right status, no key, no address."""

import json
from typing import Any

import pytest

from accounting.contract.catalogue import Provider, Target
from accounting.contract.errors import (
    Failure,
    ProviderFailed,
    ProviderLimited,
    ProviderMisconfigured,
    ProviderRefused,
)
from accounting.contract.settings import Secret
from proxy.provider_errors import failure_of, scrubbed

SECRET = "sk-secret-0123456789-WXYZ"


def provider(**fields: Any) -> Provider:
    return Provider(
        **{
            "name": "p", "host": "api.provider.example", "port": 8443, "tls": True, "path": "/v1",
            "api_key": Secret(SECRET), "ca_file": "", "connect_timeout_seconds": None,
            "first_byte_timeout_seconds": None, "chunk_timeout_seconds": None,
            "total_timeout_seconds": None,
        }
        | fields
    )  # fmt: skip


TARGET = Target(provider(), "m")


def failure(status: int, body: object = b"", retry_after: bytes = b"") -> Failure:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return failure_of(status, raw, retry_after, TARGET)


def public(found: Failure) -> str:
    """Everything a client can see of it."""
    return found.body("req_1").decode() + repr(found.headers())


@pytest.mark.parametrize("status", [400, 413, 415, 422])
def test_what_the_client_did_wrong_keeps_its_status_and_words(status: int) -> None:
    error = {
        "message": "too long",
        "type": "x",
        "code": "context_length_exceeded",
        "param": "messages",
    }
    found = failure(status, {"error": error})
    assert isinstance(found, ProviderRefused)
    assert (found.status, found.text, found.code, found.param) == (
        status, "too long", "context_length_exceeded", "messages",
    )  # fmt: skip
    assert found.type == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>Bad Request</html>",
        b"\xff\xfe",
        b"[" * 100_000,
        [],
        {},
        {"error": None},
        {"error": "a string"},
        {"error": []},
        {"error": {}},
        {"error": {"message": None}},
        {"error": {"message": ""}},
        {"error": {"message": 5, "code": 5}},
        {"detail": "as some do"},
    ],
)
def test_a_refusal_without_usable_words(body: object) -> None:
    found = failure(400, body)
    assert (found.status, found.code, found.param) == (400, "provider_refused", None)
    assert found.text == "The provider refused the request."


@pytest.mark.parametrize("code", [None, 5, {}, "", ["x"]])
def test_a_code_that_is_no_word_is_ours(code: object) -> None:
    found = failure(400, {"error": {"message": "no", "code": code, "param": code}})
    assert (found.text, found.code) == ("no", "provider_refused")
    assert not found.param


@pytest.mark.parametrize("status", [401, 402, 403, 404, 405])
def test_what_we_did_wrong_is_ours_to_answer_for(status: int) -> None:
    found = failure(status, {"error": {"message": f"Incorrect API key {SECRET}"}})
    assert isinstance(found, ProviderMisconfigured)
    assert found.status == 502
    assert "Incorrect" not in public(found)


@pytest.mark.parametrize(
    "status", [100, 201, 204, 301, 302, 304, 307, 408, 409, 418, 451, 500, 502, 503, 529, 599]
)
def test_everything_else_is_the_provider_s_failure(status: int) -> None:
    found = failure(status, {"error": {"message": "internal detail"}})
    assert type(found) is ProviderFailed
    assert found.status == 502
    assert "detail" not in public(found)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (b"", None),
        (b"0", "1"),
        (b"1", "1"),
        (b"20", "20"),
        (b"3600", "3600"),
        (b"3601", None),
        (b"9" * 5000, None),
        (b"-5", None),
        (b"1.5", None),
        (b"Wed, 21 Oct 2026 07:28:00 GMT", None),
        (b"\xb2", None),
        (b"soon", None),
    ],
)
@pytest.mark.parametrize(("status", "kind"), [(429, ProviderLimited), (503, ProviderFailed)])
def test_how_long_to_wait(
    header: bytes, seconds: str | None, status: int, kind: type[Failure]
) -> None:
    found = failure(status, b"", header)
    assert type(found) is kind
    assert dict(found.headers()).get("retry-after") == seconds


@pytest.mark.parametrize(
    "text",
    [
        f"Incorrect API key provided: {SECRET}.",
        "Incorrect API key provided: sk-se*************WXYZ. Find yours at https://api.provider.example/keys",
        "cannot reach https://api.provider.example:8443/v1/chat",
        f"{SECRET}{SECRET} at api.provider.example:8443 and api.provider.example",
        "x" * 490 + SECRET,
    ],
)
@pytest.mark.parametrize("where", ["message", "code", "param"])
def test_neither_key_nor_address_gets_through(text: str, where: str) -> None:
    found = public(failure(400, {"error": {"message": "no", where: text}}))
    for hidden in (SECRET, "WXYZ", "provider.example", "8443", SECRET[:12]):
        assert hidden not in found


def test_words_are_short() -> None:
    assert len(failure(400, {"error": {"message": "é" * 10_000}}).text) == 500
    found = failure(400, {"error": {"message": "no", "code": "c" * 10_000, "param": "p" * 10_000}})
    assert len(found.code) == len(found.param or "") == 100


def test_a_short_or_absent_key_is_not_looked_for_in_parts() -> None:
    assert scrubbed("the bees", provider(api_key=Secret("bees"))) == "the [hidden]"
    assert scrubbed("sleepless bees", provider(api_key=Secret("xxxxbees"))) == "sleepless bees"
    assert scrubbed("text", provider(api_key=Secret(""))) == "text"
