"""The head of each upstream request, as a target has it."""

import pytest

from accounting.contract import catalogue
from accounting.contract.catalogue import Catalogue
from proxy.routing import _head

PATH = "/chat/completions"


def parsed(base_url: str, key: str) -> Catalogue:
    text = f"""
[providers.p]
base_url = "{base_url}"
{'api_key_env = "KEY"' if key else ""}
[models.m]
targets = ["p/there"]
context_tokens = 1000
max_output_tokens = 100
price = {{ input = "1", output = "2" }}
"""
    return catalogue.parse(text, {"KEY": key}, False)


def lines(base_url: str, key: str = "sk-1") -> list[str]:
    head = _head(parsed(base_url, key).models["m"].targets[0], PATH)
    assert head.endswith(b"\r\n") and not head.endswith(b"\r\n\r\n")
    return head.decode("ascii").split("\r\n")[:-1]


@pytest.mark.parametrize(
    ("base_url", "line", "host"),
    [
        ("https://api.example/v1", "POST /v1/chat/completions HTTP/1.1", "api.example"),
        ("https://api.example", "POST /chat/completions HTTP/1.1", "api.example"),
        ("https://api.example:443/v1/", "POST /v1/chat/completions HTTP/1.1", "api.example"),
        ("https://api.example:80/v1", "POST /v1/chat/completions HTTP/1.1", "api.example:80"),
        ("http://api.example:80/a/b", "POST /a/b/chat/completions HTTP/1.1", "api.example"),
        ("http://127.0.0.1:9000/v1", "POST /v1/chat/completions HTTP/1.1", "127.0.0.1:9000"),
        ("http://[::1]:9000/v1", "POST /v1/chat/completions HTTP/1.1", "[::1]:9000"),
        ("https://[::1]/v1", "POST /v1/chat/completions HTTP/1.1", "[::1]"),
    ],
)
def test_the_request_line_and_host(base_url: str, line: str, host: str) -> None:
    found = lines(base_url)
    assert (found[0], found[1]) == (line, f"host: {host}")


def test_every_other_line() -> None:
    assert lines("https://api.example/v1", "sk-secret")[2:] == [
        "content-type: application/json",
        "accept: application/json, text/event-stream",
        "accept-encoding: identity",
        "user-agent: tollgate",
        "authorization: Bearer sk-secret",
    ]


def test_without_a_key_there_is_no_authorization() -> None:
    assert not any(line.startswith("authorization") for line in lines("http://localhost:1/v1", ""))
