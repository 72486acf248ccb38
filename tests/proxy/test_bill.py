"""The journal's opening says of an exchange what its bill and its event say."""

import json
from typing import Any

import msgspec
import pytest

from accounting.contract import catalogue
from accounting.contract.keyspace import KeyRecord
from accounting.contract.usage_event import SCHEMA, UsageEvent
from proxy import request_head
from proxy.admission import Hold
from proxy.bill import NOTHING, ROUTE, Bill, Timing
from proxy.cooldown import Cooldown, CooldownRules
from proxy.replay import Opening
from proxy.routing import Stop
from tests.proxy.test_routing import parsed

REQUEST_ID = b"req_01JD00000000000000000000AA"
RECORD = KeyRecord(1, "key_1", "ws_1", "name", [], [])


@pytest.mark.interpreted  # a stop that leads nowhere
@pytest.mark.parametrize("fields", [{"max_tokens": 7}, {"stream": True}])
def test_an_opening_can_be_read_back(fields: dict[str, Any]) -> None:
    body = json.dumps({"model": "m", "messages": [], **fields}).encode()
    model = parsed("https://api.example/v1", "sk-1").models["m"]
    cooldown = Cooldown(CooldownRules(30, 5, 0.5, 5, 60), lambda seconds: None)
    stop = Stop(model, 0, None, cooldown)  # type: ignore[arg-type]  # nothing is sent
    head = request_head.parse(body)
    bill = Bill(REQUEST_ID, RECORD, head, model, body, Timing(1.0, 1_700_000_000_000_000))
    hold = Hold(bill.credits_ucr, bill.tokens, 1_700_000_000_000_009, b"")
    found = msgspec.msgpack.decode(bill.opening(hold, stop), type=Opening)
    assert found.event == bill.event(hold, NOTHING, "void", "cut", 0, stop, 0, 1.0)
    assert (found.price, found.tokens_held, found.admitted_at_us) == (
        model.price, hold.tokens, hold.admitted_at_us,
    )  # fmt: skip
    assert (found.input_bound, found.output_bound) == (bill.input_bound, bill.output_bound)
    assert found.input_estimate == -(-len(body) // 4)
    event: UsageEvent = found.event
    assert (event.schema, event.route, event.model) == (SCHEMA, ROUTE, "m")
    assert (event.served_by, event.streamed) == ("p/there", "stream" in fields)


def test_a_cost_is_worked_out_for_each_usage() -> None:
    body = b'{"model":"m","messages":[],"max_tokens":9}'
    model = parsed("https://api.example/v1", "sk-1").models["m"]
    bill = Bill(REQUEST_ID, RECORD, request_head.parse(body), model, body, Timing(1.0, 1))
    hold = Hold(bill.credits_ucr, bill.tokens, 1, b"")
    few, many = (msgspec.structs.replace(NOTHING, output=count) for count in (3, 6))
    assert [bill.charge(tokens, hold) for tokens in (few, many, few, NOTHING)] == [
        6, 12, 6, 0,
    ]  # fmt: skip


SOUND = """
[providers.p]
base_url = "http://127.0.0.1:1/v1"
[models.m]
targets = ["p/there"]
context_tokens = 1000
max_output_tokens = 100
price = { input = "1", output = "2", %s }
"""
SPOKEN = {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}}


def _escaped(text: str) -> str:
    return "".join(f"\\u{ord(letter):04x}" for letter in text)


@pytest.mark.parametrize("rate", ["audio_input", "audio_output"])
@pytest.mark.parametrize(
    ("content", "is_sound"),
    [
        (json.dumps([SPOKEN]), True),
        (json.dumps([SPOKEN]).replace("input_audio", _escaped("input_audio")), True),
        (json.dumps([SPOKEN]).replace("input_audio", "input_\\u0061udio"), True),
        (json.dumps([SPOKEN]) + " " * 20_000, True),
        (json.dumps([SPOKEN]).replace("audio", _escaped("audio")) + " " * 20_000, True),
        ('"Sound is a wave. \\u00e9"', False),
    ],
)
def test_sound_is_held_at_its_price_however_it_is_written(
    content: str, is_sound: bool, rate: str
) -> None:
    body = f'{{"model":"m","messages":[{{"role":"user","content":{content}}}]}}'.encode()
    head = request_head.parse(body)
    timing = Timing(1.0, 1)
    dear, plain = (
        catalogue.parse(SOUND % f'{rate} = "{price}"', {}, False).models["m"] for price in (9, 1)
    )
    held = [Bill(REQUEST_ID, RECORD, head, one, body, timing).credits_ucr for one in (dear, plain)]
    assert (held[0] > held[1]) == is_sound
    if is_sound:
        assert held[0] == {"audio_input": 9_200, "audio_output": 1_900}[rate]
