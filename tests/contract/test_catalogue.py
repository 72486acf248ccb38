"""The catalogue: a good one is read whole, a bad one refused by the name of what is wrong."""

import re
import tomllib
from datetime import date
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from accounting.contract.catalogue import Catalogue, CatalogueError, load, parse
from accounting.contract.money import parse_credits
from accounting.contract.pricing import MILLION, Rates, cost_ucr
from accounting.contract.usage_event import TokenUsage

KEYS = {"OPENAI_API_KEY": "sk-open", "OTHER_API_KEY": "sk-other"}

GOOD = """
[providers.openai]
base_url = "https://api.openai.com/v1/"
api_key_env = "OPENAI_API_KEY"
first_byte_timeout_seconds = 30

[providers.other]
base_url = "http://127.0.0.1:9000"
api_key_env = "OTHER_API_KEY"
optional = true
ca_file = "/etc/ca.pem"

[providers.box]
base_url = "http://[::1]:8090/v1"
sandbox = true

[models."gpt-4o-mini"]
targets = ["openai/gpt-4o-mini", "other/team/gpt-4o-mini"]
context_tokens = 128000
max_output_tokens = 16384
price = { input = "15", cached_input = "7.5", output = "60" }
source = "https://openai.com/api/pricing"
source_date = "2026-01-01"

[models."tiered"]
targets = ["other/tiered"]
context_tokens = 1000000
max_output_tokens = 65536
[models."tiered".price]
input = "125"
output = "1000"
cache_write = "150"
audio_input = "300"
audio_output = "2000"
long = { above = 200000, input = "250", output = "1500" }

[models."box-1"]
targets = ["box/box-1"]
context_tokens = 8000
max_output_tokens = 1000
price = { input = "0.000001", output = "1" }
"""


def good(environ: dict[str, str] | None = None, sandbox: bool = True) -> Catalogue:
    return parse(GOOD, KEYS if environ is None else environ, sandbox)


def minimal(
    provider: str = 'base_url = "http://p:1/v1"',
    targets: str = '["p/m"]',
    price: str = '{ input = "1", output = "2" }',
    limits: str = "context_tokens = 1000\nmax_output_tokens = 100",
    more: str = "",
    name: str = '"m"',
) -> str:
    return (
        f"[providers.p]\n{provider}\n[models.{name}]\ntargets = {targets}\n{limits}\n"
        f"price = {price}\n{more}"
    )


def test_providers_are_read() -> None:
    found = good().providers
    openai, other, box = found["openai"], found["other"], found["box"]
    assert (openai.host, openai.port, openai.tls, openai.path) == (
        "api.openai.com",
        443,
        True,
        "/v1",
    )
    assert openai.api_key.reveal() == "sk-open"
    assert openai.first_byte_timeout_seconds == 30
    assert openai.connect_timeout_seconds is openai.total_timeout_seconds is None
    assert (other.host, other.port, other.tls, other.path) == ("127.0.0.1", 9000, False, "")
    assert other.ca_file == "/etc/ca.pem"
    assert (box.host, box.port, box.path) == ("::1", 8090, "/v1")
    assert not box.api_key


def test_models_are_read() -> None:
    model = good().models["gpt-4o-mini"]
    assert [str(target) for target in model.targets] == [
        "openai/gpt-4o-mini",
        "other/team/gpt-4o-mini",
    ]
    assert model.targets[1].model == "team/gpt-4o-mini"
    assert (model.context_tokens, model.max_output_tokens) == (128_000, 16_384)
    assert model.price.base == Rates(
        input=15_000_000,
        output=60_000_000,
        cached_input=7_500_000,
        cache_write=15_000_000,
        audio_input=15_000_000,
        audio_output=60_000_000,
    )
    assert model.price.long is None
    assert model.quoted == {"input": "15", "cached_input": "7.5", "output": "60"}
    assert (model.source, model.source_date) == ("https://openai.com/api/pricing", "2026-01-01")


def test_the_long_tier_and_every_meter_are_read() -> None:
    price = good().models["tiered"].price
    assert price.base.cache_write == 150_000_000
    assert (price.base.audio_input, price.base.audio_output) == (300_000_000, 2_000_000_000)
    assert price.base.cached_input == price.base.input
    assert price.long is not None
    assert (price.long_above, price.long.input, price.long.output) == (
        200_000,
        250_000_000,
        1_500_000_000,
    )


def test_credits_per_million_tokens_are_charged_as_such() -> None:
    price = good().models["gpt-4o-mini"].price
    assert cost_ucr(price, TokenUsage(MILLION, 0)) == parse_credits("15")
    assert cost_ucr(price, TokenUsage(0, MILLION)) == parse_credits("60")


def test_the_smallest_price_is_a_micro_credit() -> None:
    assert good().models["box-1"].price.base.input == 1


def test_the_price_version_follows_the_figures_alone() -> None:
    version = good().models["gpt-4o-mini"].price.version
    assert re.fullmatch(r"[0-9a-f]{12}", version)
    respelled = GOOD.replace('input = "15"', 'input = "15.0"')
    assert parse(respelled, KEYS, True).models["gpt-4o-mini"].price.version == version
    dearer = GOOD.replace('output = "60"', 'output = "60.000001"')
    assert parse(dearer, KEYS, True).models["gpt-4o-mini"].price.version != version
    versions = {model.price.version for model in good().models.values()}
    assert len(versions) == 3


def test_an_optional_provider_without_its_key_is_left_out() -> None:
    found = good({"OPENAI_API_KEY": "sk"})
    assert set(found.providers) == {"openai", "box"}
    assert [str(target) for target in found.models["gpt-4o-mini"].targets] == ["openai/gpt-4o-mini"]
    assert "tiered" not in found.models


def test_an_empty_key_is_no_key() -> None:
    assert "other" not in good({"OPENAI_API_KEY": "sk", "OTHER_API_KEY": ""}).providers
    with pytest.raises(CatalogueError, match="'openai': OPENAI_API_KEY is not set"):
        good({"OPENAI_API_KEY": ""})


def test_the_sandbox_is_on_offer_only_where_asked_for() -> None:
    assert {"box-1"} <= set(good(sandbox=True).models)
    without = good(sandbox=False)
    assert "box" not in without.providers and "box-1" not in without.models


def test_a_catalogue_with_nothing_live_is_refused() -> None:
    text = minimal('base_url = "http://p/v1"\napi_key_env = "P_KEY"\noptional = true')
    with pytest.raises(CatalogueError, match="no model is live"):
        parse(text, {}, False)
    assert "m" in parse(text, {"P_KEY": "k"}, False).models


def test_keys_never_show() -> None:
    assert "sk-open" not in repr(good()) + str(good())


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[", "catalogue: "),
        ("", "catalogue: .*providers"),
        ("[providers.p]\nbase_url = 'http://p'", "catalogue: .*models"),
        (minimal() + "[other]\nx = 1", "catalogue: .*other"),
        (minimal(targets='["q/m"]'), "model 'm': unknown provider 'q'"),
        (minimal(targets="[]"), "model 'm'.*targets"),
        (minimal(targets='["p"]'), "model 'm': target 'p' is not provider/model"),
        (minimal(targets='["p/"]'), "model 'm': target 'p/' is not provider/model"),
        (minimal(targets='["/m"]'), "model 'm': unknown provider ''"),
        (minimal(targets='"p/m"'), "model 'm'.*targets"),
        (minimal(targets="[1]"), "model 'm'.*targets"),
        (minimal(targets='["p/mä"]'), "model 'm': target .* is not provider/model"),
        (minimal(targets=str(["p/m"] * 9)), "model 'm'.*targets"),
        (minimal(limits="context_tokens = 1000"), "model 'm'.*max_output_tokens"),
        (minimal(limits="max_output_tokens = 1000"), "model 'm'.*context_tokens"),
        (
            minimal(limits="context_tokens = 0\nmax_output_tokens = 1"),
            "model 'm'.*context_tokens",
        ),
        (
            minimal(limits="context_tokens = 1\nmax_output_tokens = -1"),
            "model 'm'.*max_output_tokens",
        ),
        (
            minimal(limits="context_tokens = 1.5\nmax_output_tokens = 1"),
            "model 'm'.*context_tokens",
        ),
        (
            minimal(limits="context_tokens = 100000001\nmax_output_tokens = 1"),
            "model 'm'.*context_tokens",
        ),
        (minimal(more="free = true"), "model 'm'.*free"),
        (minimal(name='"m\\"x"'), "model .*a name is printable"),
        (minimal(name='""'), "model ''.*a name is printable"),
        (minimal(name='"mä"'), "model .*a name is printable"),
        (minimal(name='"m\\n"'), "model .*a name is printable"),
    ],
)
def test_a_bad_table_is_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(CatalogueError, match=named) as caught:
        parse(text, KEYS, True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("price", "named"),
    [
        ('{ input = "-1", output = "2" }', "price input '-1': must not be negative"),
        ('{ input = "1", output = "-0.5" }', "price output '-0.5': must not be negative"),
        ('{ input = "0", output = "2" }', "price input is zero"),
        ('{ input = "1", output = "0.000000" }', "price output is zero"),
        ('{ input = "0.0000001", output = "2" }', "price input '0.0000001': more than 6"),
        ('{ input = "1", output = "2", cached_input = "0" }', "price cached_input is zero"),
        ('{ input = "1", output = "2", cache_write = "-2" }', "price cache_write '-2'"),
        ('{ input = "1", output = "2", audio_input = "x" }', "price audio_input 'x': not a dec"),
        ('{ input = "1", output = "2", audio_output = "" }', "price audio_output ''"),
        ('{ input = "NaN", output = "2" }', "price input 'NaN'"),
        ('{ input = "Infinity", output = "2" }', "price input 'Infinity'"),
        ('{ input = "1_5", output = "2" }', "price input '1_5'"),
        ('{ input = "9000000001", output = "2" }', "price input '9000000001': too large"),
        ('{ input = 1, output = "2" }', r"\$.price.input"),
        ('{ input = 1.5, output = "2" }', r"\$.price.input"),
        ('{ input = "1" }', "output"),
        ('{ output = "1" }', "input"),
        ("{}", "input"),
        ('"free"', r"\$.price"),
        ('{ input = "1", output = "2", request = "3" }', "request"),
        ('{ input = "1", output = "2", long = { input = "1", output = "2" } }', "above"),
        ('{ input = "1", output = "2", long = { above = 5, input = "1" } }', "output"),
        (
            '{ input = "1", output = "2", long = { above = 0, input = "1", output = "2" } }',
            "above",
        ),
        (
            '{ input = "1", output = "2", long = { above = 5, input = "0", output = "2" } }',
            "price input is zero",
        ),
        (
            '{ input = "1", output = "2", long = { above = 5, input = "1", output = "-2" } }',
            "price output '-2'",
        ),
    ],
)
def test_a_bad_price_is_refused_by_model_and_meter(price: str, named: str) -> None:
    with pytest.raises(CatalogueError, match=f"model 'm': .*{named}"):
        parse(minimal(price=price), KEYS, True)


def test_a_worst_case_beyond_any_balance_is_refused() -> None:
    text = minimal(
        price='{ input = "9000000000", output = "1" }',
        limits="context_tokens = 1000001\nmax_output_tokens = 1",
    )
    with pytest.raises(CatalogueError, match="model 'm': its worst case is beyond any balance"):
        parse(text, KEYS, True)


def test_a_model_without_a_price_is_refused() -> None:
    text = re.sub(r"price = .*\n", "", minimal())
    with pytest.raises(CatalogueError, match="model 'm': has no price"):
        parse(text, KEYS, True)


def test_a_model_of_an_absent_provider_is_proven_all_the_same() -> None:
    provider = 'base_url = "http://p/v1"\napi_key_env = "P_KEY"\noptional = true'
    with pytest.raises(CatalogueError, match="model 'm': price input is zero"):
        parse(minimal(provider, price='{ input = "0", output = "1" }'), {}, True)


@pytest.mark.parametrize(
    ("provider", "named"),
    [
        ('base_url = ""', "base_url"),
        ('base_url = "api.openai.com"', "base_url"),
        ('base_url = "ftp://p/v1"', "base_url"),
        ('base_url = "http:///v1"', "base_url"),
        ('base_url = "http://p/v1?key=1"', "base_url"),
        ('base_url = "http://p/v1#x"', "base_url"),
        ('base_url = "http://me:pw@p/v1"', "must not carry credentials"),
        ('base_url = "http://me@p/v1"', "must not carry credentials"),
        ('base_url = "http://p:99999/v1"', "no valid port"),
        ('base_url = "http://p:x/v1"', "no valid port"),
        ('base_url = "http://p:0/v1"', "no valid port"),
        ('base_url = "http://[::1/v1"', "base_url"),
        ('base_url = "http://p/v1 HTTP/1.1"', "base_url"),
        ('base_url = "http://p/v1\\r\\nx: y"', "base_url"),
        ('base_url = "http://p/vä"', "base_url"),
        ("base_url = 1", "base_url"),
        ("", "base_url"),
        ('base_url = "http://p"\napi_key = "sk-oops"', "api_key"),
        ('base_url = "http://p"\noptional = 1', "optional"),
        ('base_url = "http://p"\ntotal_timeout_seconds = 0', "total_timeout_seconds"),
        ('base_url = "http://p"\nchunk_timeout_seconds = -1', "chunk_timeout_seconds"),
        ('base_url = "http://p"\nconnect_timeout_seconds = nan', "connect_timeout_seconds"),
        ('base_url = "http://p"\nfirst_byte_timeout_seconds = inf', "first_byte_timeout_seconds"),
        ('base_url = "http://p"\napi_key_env = "P_KEY"', "P_KEY is not set"),
        ('base_url = "http://p"\napi_key_env = "SPACED"', "SPACED is not a usable key"),
        ('base_url = "http://p"\napi_key_env = "BROKEN"', "BROKEN is not a usable key"),
    ],
)
def test_a_bad_provider_is_refused_by_name(provider: str, named: str) -> None:
    environ = {"SPACED": "hunter2 x", "BROKEN": "hunter2\r\nHost: evil"}
    with pytest.raises(CatalogueError, match=f"provider 'p': .*{named}") as caught:
        parse(minimal(provider), environ, True)
    assert "hunter2" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused_by_its_path(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.toml")
    with pytest.raises(CatalogueError, match=r"missing\.toml"):
        load(missing, KEYS, True)
    with pytest.raises(CatalogueError, match=re.escape(str(tmp_path))):
        load(str(tmp_path), KEYS, True)
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b"# \xe4\xff")
    with pytest.raises(CatalogueError, match=r"latin\.toml"):
        load(str(latin), KEYS, True)


def test_a_file_is_read_from_its_path(tmp_path: Path) -> None:
    path = tmp_path / "catalogue.toml"
    path.write_text(GOOD, "utf-8")
    assert set(load(str(path), KEYS, True).models) == {"gpt-4o-mini", "tiered", "box-1"}


def starter() -> dict[str, Any]:
    path = resources.files("accounting.contract") / "catalogue.toml"
    return tomllib.loads(path.read_text("utf-8"))


def every_key() -> dict[str, str]:
    return {
        provider["api_key_env"]: "sk-test"
        for provider in starter()["providers"].values()
        if "api_key_env" in provider
    }


def test_the_starter_catalogue_is_live_with_every_key() -> None:
    found = load("", every_key(), True)
    assert set(found.models) == set(starter()["models"])
    assert set(found.providers) == set(starter()["providers"])
    assert len(found.models) >= 40
    assert {"openai", "anthropic", "google", "xai", "deepseek", "alibaba"} <= set(found.providers)


def test_the_starter_catalogue_says_where_each_price_is_from() -> None:
    today = date.today()
    for model in load("", every_key(), True).models.values():
        assert model.source, model.name
        assert date(2024, 1, 1) < date.fromisoformat(model.source_date) <= today, model.name


def test_the_starter_catalogue_needs_no_key_in_the_sandbox() -> None:
    found = load("", {}, True)
    assert found.models
    assert all(provider.name == "sandbox" for provider in found.providers.values())
    with pytest.raises(CatalogueError, match="no model is live"):
        load("", {}, False)


@pytest.mark.parametrize("variable", sorted(every_key()))
def test_one_key_is_enough_for_its_provider(variable: str) -> None:
    found = load("", {variable: "sk-test"}, False)
    assert found.models
    assert len(found.providers) == 1


def test_the_starter_catalogue_speaks_tls_to_everyone_else() -> None:
    for provider in load("", every_key(), True).providers.values():
        assert provider.tls or provider.host == "127.0.0.1"
