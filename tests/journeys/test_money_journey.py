"""Money in, spent, exhausted, topped up, stopped: the life of a wallet over the operator API.

Requests are sent byte for byte as known here, so that every hold and charge can be worked out
beforehand from the catalogue's prices.
"""

import asyncio
import json
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from http.client import HTTPConnection
from typing import Any

import psutil
import pytest

from tests.journeys.account import CREDITS_PER_USD, Account
from tests.journeys.running import UCR_PER_CREDIT, Reply, Running, call
from tests.waiting import eventually_blocking

CHAT = "/v1/chat/completions"
INPUT_UCR, OUTPUT_UCR = 15, 60  # µcr per token of `sandbox-small`, as in the catalogue
_TEMPLATE_TOKENS = 32  # what admission allows for beyond the bytes of a body
_CONNECTIONS = 64  # enough to meet every worker


class Ask:
    """A plain request that will use so many tokens, and may use `max_tokens` of output."""

    def __init__(self, prompt_tokens: int, completion_tokens: int, max_tokens: int) -> None:
        script = f"prompt_tokens={prompt_tokens}; completion_tokens={completion_tokens}"
        self.body: dict[str, Any] = {
            "model": "sandbox-small",
            "max_tokens": max_tokens,
            "messages": [{"role": "user", "content": f"[[standin {script}]]"}],
        }
        input_bound = len(json.dumps(self.body)) + _TEMPLATE_TOKENS
        self.hold = credits(input_bound * INPUT_UCR + max_tokens * OUTPUT_UCR)
        self.charge = credits(prompt_tokens * INPUT_UCR + completion_tokens * OUTPUT_UCR)

    @classmethod
    def that_uses_all_it_holds(cls, max_tokens: int) -> "Ask":
        for prompt_tokens in range(100, 1000):
            ask = cls(prompt_tokens, max_tokens, max_tokens)
            if ask.hold == ask.charge:
                return ask
        raise AssertionError("no such request")


def credits(ucr: int) -> Decimal:
    return Decimal(ucr) / UCR_PER_CREDIT


def usd(amount: Decimal) -> str:
    """Credits as US dollars."""
    return f"{amount / CREDITS_PER_USD:f}"


def send(account: Account, ask: Ask, key: str | None = None) -> Reply:
    """One request on a connection of its own."""
    return noted(account, account.running.client("POST", CHAT, key or account.key, ask.body))


def noted(account: Account, reply: Reply) -> Reply:
    """The reply; what it cost counts as seen."""
    account.seen.elsewhere += Decimal(reply.headers.get("x-credits-used", "0"))
    return reply


def read(account: Account, path: str, key: str | None = None) -> Any:
    reply = account.running.client("GET", f"/v1/account/{path}", key or account.key)
    assert reply.status == 200, reply
    return reply.body


def test_the_life_of_a_wallet(account: Account) -> None:
    ask = Ask(prompt_tokens=100, completion_tokens=50, max_tokens=60)

    # Nothing there yet
    empty = send(account, ask)
    assert (empty.status, empty.code) == (402, "INSUFFICIENT_CREDIT")
    assert empty.body["error"]["metadata"] == {
        "limit_source": "balance",
        "balance_credits": "0",
        "held_credits": "0",
        "required_credits": str(ask.hold),
        "affordable_credits": "0",
    }
    assert empty.headers["x-should-retry"] == "false"

    # Two kinds of credit; a key that may spend but a part of them
    account.grant(usd(2 * ask.charge), "trial")
    account.grant(usd(4 * ask.hold), "topup")
    _, limited = account.new_key(cost_cap_usd=usd(ask.hold + ask.charge))
    left = account.granted_usd * CREDITS_PER_USD
    for _ in range(2):
        assert send(account, ask, limited).status == 200
        left -= ask.charge
        settled(account, left)  # until then the cap counts all that may still be charged
    capped = send(account, ask, limited)
    assert (capped.status, capped.code) == (403, "plan_limit_exceeded")
    assert Decimal(capped.body["error"]["metadata"]["used_credits"]) == 2 * ask.charge
    account.records(2)
    assert read(account, "balance")["trial"]["remaining_usd"] == 0

    # Spend until it is gone
    while left >= ask.hold:
        assert Decimal(send(account, ask).headers["x-credits-used"]) == ask.charge
        left -= ask.charge
        settled(account, left)
    refused = send(account, ask)
    assert (refused.status, refused.code) == (402, "INSUFFICIENT_CREDIT")
    told = refused.body["error"]["metadata"]
    assert Decimal(told["affordable_credits"]) == Decimal(told["balance_credits"]) == left
    assert Decimal(told["required_credits"]) == ask.hold > left

    # What is missing is enough to go on, and no less
    account.grant(usd(ask.hold - left - credits(1)), "promo")
    assert send(account, ask).status == 402
    account.grant(usd(credits(1)))
    assert send(account, ask).status == 200
    settled(account, ask.hold - ask.charge)


def settled(account: Account, left: Decimal) -> None:
    """Wait until the wallet has this many credits, none of them held."""

    def wallet() -> bool:
        found = account.details()
        return (found["available_usd"], found["held_usd"]) == (left / CREDITS_PER_USD, 0)

    eventually_blocking(wallet, 20)


def test_grants_burn_in_their_order_whatever_order_they_came_in(account: Account) -> None:
    ask = Ask(prompt_tokens=100, completion_tokens=50, max_tokens=60)
    soon = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    later = (datetime.now(UTC) + timedelta(days=2)).isoformat()
    half = usd(ask.charge / 2)
    topup = account.grant("1", "topup")["grant_id"]
    plan = account.grant(half, "plan")["grant_id"]
    promo_later = account.grant(half, "promo", expires_at=later)["grant_id"]
    promo_soon = account.grant(half, "promo", expires_at=soon)["grant_id"]
    trial = account.grant(half, "trial", expires_at=later)["grant_id"]
    assert read(account, "balance")["trial"]["remaining_usd"] == Decimal(half)
    burned = []
    for count in range(1, 5):
        assert send(account, ask).status == 200
        burned += json.loads(account.records(count)[-1]["burned"])
    part, whole = int(ask.charge / 2 * UCR_PER_CREDIT), int(ask.charge * UCR_PER_CREDIT)
    in_order = [[trial, part], [promo_soon, part], [promo_later, part], [plan, part]]
    assert burned == [*in_order, [topup, whole], [topup, whole]]
    assert read(account, "balance")["trial"]["remaining_usd"] == 0


def test_a_grant_asked_for_twice_is_given_once(account: Account) -> None:
    first = account.grant("3", idempotency_key="order-1")
    again = account.running.operator(
        "POST",
        f"/workspaces/{account.workspace_id}/grants",
        {"kind": "topup", "amount_usd": "3", "idempotency_key": "order-1"},
    )
    assert again["grant_id"] == first["grant_id"]
    assert account.details()["balance_usd"] == 3


async def test_a_wallet_for_seven_requests_serves_seven_of_many(account: Account) -> None:
    ask = Ask.that_uses_all_it_holds(max_tokens=60)
    account.grant(usd(7 * ask.hold))
    request = ("POST", CHAT, account.key, ask.body)
    sending = [asyncio.to_thread(account.running.client, *request) for _ in range(30)]
    replies = [noted(account, reply) for reply in await asyncio.gather(*sending)]
    served = [reply for reply in replies if reply.status == 200]
    refused = [reply for reply in replies if reply.status != 200]
    assert [Decimal(reply.headers["x-credits-used"]) for reply in served] == [ask.charge] * 7
    assert {(reply.status, reply.code) for reply in refused} == {(402, "INSUFFICIENT_CREDIT")}
    settled(account, Decimal(0))


def test_what_a_stream_holds_is_told_and_comes_back(account: Account) -> None:
    ask = Ask(prompt_tokens=10, completion_tokens=5, max_tokens=1000)
    account.grant(usd(ask.hold + ask.hold / 2))
    stream = account.openai().chat.completions.create(
        model="sandbox-small",
        messages=[{"role": "user", "content": "[[standin fault=hang_mid_stream; fault_after=2]]"}],
        max_tokens=1000,
        stream=True,
    )
    next(stream)
    held = account.details()["held_usd"] * CREDITS_PER_USD
    assert held > ask.hold / 2
    refused = send(account, ask)
    assert (refused.status, refused.code) == (402, "INSUFFICIENT_CREDIT")
    told = refused.body["error"]["metadata"]
    assert told["limit_source"] == "in_flight_holds"
    assert Decimal(told["held_credits"]) == held
    assert Decimal(told["affordable_credits"]) == Decimal(told["balance_credits"]) - held
    assert refused.headers["retry-after"] == "1"
    stream.close()
    eventually_blocking(lambda: account.details()["held_usd"] == 0, 20)
    assert send(account, ask).status == 200


# Stopping


@pytest.fixture
def one_for_each_worker(journey: Running) -> Iterator[list[HTTPConnection]]:
    """A connection to every proxy worker, each kept open."""
    workers = [
        process for process in journey.stack.processes if "proxy.worker" in process.cmdline()
    ]
    assert len(workers) == 2
    with ExitStack() as opened:
        found: dict[int, HTTPConnection] = {}
        for _ in range(_CONNECTIONS):
            connection = journey.connection()
            opened.callback(connection.close)
            connection.connect()
            found[served_by(connection, workers)] = connection
            if len(found) == len(workers):
                break
        assert len(found) == len(workers)
        yield list(found.values())


def served_by(connection: HTTPConnection, workers: list[psutil.Process]) -> int:
    """The process that has accepted a connection."""
    port = connection.sock.getsockname()[1]

    def accepted() -> int:
        for worker in workers:
            ends = [end.raddr.port for end in worker.net_connections("tcp") if end.raddr]
            if port in ends:
                return worker.pid
        return 0

    return int(eventually_blocking(accepted))


def test_a_revoked_key_is_refused_at_once_by_every_worker(
    funded: Account, one_for_each_worker: list[HTTPConnection]
) -> None:
    ask = Ask(prompt_tokens=10, completion_tokens=5, max_tokens=10)
    key_id, key = funded.new_key()
    for connection in one_for_each_worker:
        assert noted(funded, call(connection, "POST", CHAT, key, ask.body)).status == 200
    path = f"/v1/account/keys/revoke/{key_id}"
    revoked = funded.running.client("DELETE", path, funded.key)
    assert (revoked.status, revoked.body) == (200, {"revoked": True})
    for connection in one_for_each_worker:
        refused = call(connection, "POST", CHAT, key, ask.body)
        assert (refused.status, refused.code) == (401, "invalid_api_key")
    assert funded.running.client("GET", "/v1/account/balance", key).status == 401
    states = {one["key_id"]: one["status"] for one in read(funded, "keys/list")["items"]}
    assert states == {key_id: "revoked", funded.key_id: "active"}


def test_a_suspended_workspace_may_read_but_not_spend(
    funded: Account, one_for_each_worker: list[HTTPConnection]
) -> None:
    ask = Ask(prompt_tokens=10, completion_tokens=5, max_tokens=10)
    for verb, status in [("suspend", 403), ("resume", 200)]:
        changed = funded.operator(verb)
        assert changed["status"] == ("suspended" if status == 403 else "active")
        for connection in one_for_each_worker:
            reply = noted(funded, call(connection, "POST", CHAT, funded.key, ask.body))
            assert reply.status == status
            assert status == 200 or reply.code == "account_suspended"
        assert read(funded, "whoami")["status"] == changed["status"]
        assert read(funded, "balance")["balance_usd"] > 9
        assert read(funded, "keys/list")["items"]


def test_usage_is_told_per_hour_model_and_key(funded: Account) -> None:
    ask = Ask(prompt_tokens=10, completion_tokens=5, max_tokens=10)
    broken = Ask(prompt_tokens=10, completion_tokens=5, max_tokens=10)
    broken.body["messages"] = [{"role": "user", "content": "[[standin status=400]]"}]
    other_id, other = funded.new_key()
    statuses = [send(funded, ask).status for _ in range(3)]
    statuses += [send(funded, one, other).status for one in (ask, broken)]
    assert statuses == [200, 200, 200, 200, 400]
    funded.records(5)
    rows = funded.running.rows(
        "select key_id, model, sum(requests)::int as requests, sum(errors)::int as errors,"
        " sum(input_tokens)::int as input, sum(output_tokens)::int as output,"
        " sum(charge_ucr)::bigint as ucr from usage_hourly where workspace_id = $1"
        " group by 1, 2 order by requests desc",
        funded.workspace_id,
    )
    charge = int(ask.charge * UCR_PER_CREDIT)
    common = {"model": "sandbox-small"}
    assert rows == [
        {**common, "key_id": funded.key_id, "requests": 3, "errors": 0}
        | {"input": 30, "output": 15, "ucr": 3 * charge},
        {**common, "key_id": other_id, "requests": 2, "errors": 1}
        | {"input": 10, "output": 5, "ucr": charge},
    ]
