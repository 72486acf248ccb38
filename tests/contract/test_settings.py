"""Settings: every bad value is refused by its variable's name; secrets never show."""

import copy
import pickle
from typing import Any, get_args, get_type_hints

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accounting.contract.settings import (
    Address,
    Secret,
    Settings,
    SettingsError,
    describe,
    load,
    parse_address,
)

FIELDS = Settings.__struct_fields__
DEFAULTS = Settings()
NUMBERS = [name for name in FIELDS if type(getattr(DEFAULTS, name)) in (int, float)]
WHOLE = [name for name in NUMBERS if type(getattr(DEFAULTS, name)) is int]
ADDRESSES = [name for name in FIELDS if isinstance(getattr(DEFAULTS, name), Address)]
SECRETS = [name for name in FIELDS if isinstance(getattr(DEFAULTS, name), Secret)]


def variable(field: str) -> str:
    return "TOLLGATE_" + field.upper()


def refuse(field: str, text: str) -> str:
    with pytest.raises(SettingsError) as caught:
        load({variable(field): text})
    assert str(caught.value).startswith(variable(field) + ": ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_empty_environment_gives_the_documented_defaults() -> None:
    settings = load({})
    assert str(settings.listen) == "127.0.0.1:8080"
    assert str(settings.admin_listen) == "127.0.0.1:8081"
    assert str(settings.private_listen) == "127.0.0.1:8082"
    assert settings.workers == 0
    assert settings.catalogue == ""
    assert settings.data_dir == ".tollgate"
    assert not settings.redis_url and not settings.database_url and not settings.operator_token
    assert settings.trial_usd == "20"
    assert settings.sandbox is False


def test_foreign_variables_are_left_alone() -> None:
    assert load({"PATH": "/bin", "TOLLGATES": "x", "tollgate_listen": "x"}).workers == 0


def test_the_process_environment_is_read_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOLLGATE_WORKERS", "3")
    assert load().workers == 3


@pytest.mark.parametrize("name", ["TOLLGATE_BOGUS", "TOLLGATE_", "TOLLGATE_listen"])
def test_an_unknown_name_is_refused_by_name(name: str) -> None:
    with pytest.raises(SettingsError, match=f"^{name}: unknown setting$"):
        load({name: "1"})


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize(
    "text", ["", " ", "x", "-1", "1e400", "nan", "inf", "-inf", "1,5", "0x10", "1_0", "none"]
)
def test_a_bad_number_is_refused_by_name(field: str, text: str) -> None:
    refuse(field, text)


@pytest.mark.parametrize("field", WHOLE)
def test_a_fraction_of_a_whole_is_refused_by_name(field: str) -> None:
    refuse(field, "64.5")


@pytest.mark.parametrize("field", NUMBERS)
def test_bounds_are_inclusive_and_named(field: str) -> None:
    low, high = bounds(field)
    for text in (low, high):
        assert getattr(load({variable(field): str(text)}), field) == text
    step = 1 if field in WHOLE else max(1e-6, high * 1e-6)
    assert "<=" in refuse(field, str(high + step))
    assert ">=" in refuse(field, str(low - (1 if field in WHOLE else 1e-6)))


def bounds(field: str) -> tuple[Any, Any]:
    meta = get_args(get_type_hints(Settings, include_extras=True)[field])[1]
    return meta.ge, meta.le


@pytest.mark.parametrize("field", ADDRESSES)
@pytest.mark.parametrize(
    "text",
    [
        "", "8080", "127.0.0.1", "127.0.0.1:", ":8080", "127.0.0.1:x", "127.0.0.1:-1",
        "127.0.0.1:65536", "127.0.0.1:٨٠", "127.0.0.1:" + "9" * 5000, "::1:8080", "[::1]",
        "[]:80", "[::1:8080", "::1]:8080", "127.0.0.1]:8080", "[127.0.0.1:8080", "a b:80",
        "http://localhost:80", "localhost/x:80", "a@b:80", "localhost:80 ", " localhost:80",
        "localhost:8 0", "local\thost:80", "\x00:80",
    ],
)  # fmt: skip
def test_a_bad_address_is_refused_by_name(field: str, text: str) -> None:
    refuse(field, text)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:8080", "127.0.0.1", 8080),
        ("0.0.0.0:65535", "0.0.0.0", 65535),
        ("localhost:0", "localhost", 0),
        ("[::1]:8080", "::1", 8080),
        ("[fe80::1%eth0]:1", "fe80::1%eth0", 1),
        ("gate-1.example.com:443", "gate-1.example.com", 443),
    ],
)
def test_addresses_are_read_and_written_alike(text: str, host: str, port: int) -> None:
    assert parse_address(text) == Address(host, port)
    assert str(parse_address(text)) == text


@given(st.text(max_size=30))
def test_any_text_is_an_address_or_a_named_refusal(text: str) -> None:
    try:
        address = load({"TOLLGATE_LISTEN": text}).listen
    except SettingsError as error:
        assert str(error).startswith("TOLLGATE_LISTEN: ")
    else:
        assert parse_address(str(address)) == address
        assert 0 <= address.port <= 65535


@pytest.mark.parametrize("text", ["", "yes", "on", "2", "-1", "wahr", " true"])
def test_a_bad_flag_is_refused_by_name(text: str) -> None:
    refuse("sandbox", text)


@pytest.mark.parametrize(("text", "flag"), [("1", True), ("true", True), ("0", False)])
def test_flags_are_read(text: str, flag: bool) -> None:
    assert load({"TOLLGATE_SANDBOX": text}).sandbox is flag


@pytest.mark.parametrize(
    "text", ["", "-1", "1.", ".5", "1e3", "1.000000001", "1,5", "$20", "٣", "20\n", "nan"]
)
def test_a_bad_trial_amount_is_refused_by_name(text: str) -> None:
    refuse("trial_usd", text)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("redis_url", "hunter2"),
        ("redis_url", "http://user:hunter2@host"),
        ("redis_url", "redis://"),
        ("redis_url", "redis://:hunter2@host:1 2"),
        ("database_url", "hunter2"),
        ("database_url", "mysql://user:hunter2@host/db"),
        ("database_url", "host=x password=hunter2"),
        ("operator_token", "hunter2 hunter2"),
        ("operator_token", "hunter2\n"),
        ("operator_token", "hunter2é"),
    ],
)
def test_a_bad_secret_is_refused_by_name_without_being_shown(field: str, text: str) -> None:
    assert "hunter2" not in refuse(field, text)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("redis_url", "redis://:pw@127.0.0.1:6379/0"),
        ("redis_url", "rediss://cache.example.com"),
        ("redis_url", ""),
        ("database_url", "postgresql://u:p@h:5432/tollgate"),
        ("database_url", "postgres://h/tollgate?host=/run/postgresql"),
        ("database_url", ""),
        ("operator_token", "op_abc-DEF_123"),
        ("operator_token", ""),
    ],
)
def test_secrets_are_kept_as_they_are(field: str, text: str) -> None:
    secret = getattr(load({variable(field): text}), field)
    assert secret.reveal() == text
    assert bool(secret) is bool(text)


def test_a_secret_never_prints() -> None:
    secret = Secret("hunter2")
    settings = load({"TOLLGATE_OPERATOR_TOKEN": "hunter2"})
    for text in (
        str(secret), repr(secret), f"{secret}", f"{secret!s:>20}", repr([secret]),
        str(settings), repr(settings), f"{settings}",
    ):  # fmt: skip
        assert "hunter2" not in text
    assert repr(secret) == "Secret(set)"
    assert repr(Secret()) == "Secret(empty)"


def test_a_secret_cannot_be_encoded_or_copied_out_by_accident() -> None:
    with pytest.raises(TypeError):
        msgspec.json.encode(Secret("hunter2"))
    with pytest.raises(TypeError):
        vars(Secret("hunter2"))
    assert "hunter2" not in str(Secret.__slots__)


def test_a_secret_equals_only_itself() -> None:
    secret = Secret("hunter2")
    assert secret == secret
    assert secret != Secret("hunter2")
    assert secret != "hunter2"
    assert copy.deepcopy(secret).reveal() == pickle.loads(pickle.dumps(secret)).reveal()


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(AttributeError):
        load({}).workers = 5  # type: ignore[misc]


def test_the_description_lists_every_setting_with_meaning_and_bounds() -> None:
    rows = list(describe())
    assert [name for name, _, _ in rows] == [variable(field) for field in FIELDS]
    assert all(meaning for _, _, meaning in rows)
    described = {name: (default, meaning) for name, default, meaning in rows}
    assert described["TOLLGATE_LISTEN"][0] == "127.0.0.1:8080"
    assert described["TOLLGATE_WORKERS"] == (
        "0",
        "proxy worker processes; 0 = one per core (0–256)",
    )
    for field in NUMBERS:
        assert described[variable(field)][1].endswith(")")


def test_the_described_defaults_are_the_defaults() -> None:
    environ = {name: default for name, default, _ in describe() if default}
    again = load(environ)
    for field in FIELDS:
        if field not in SECRETS:
            assert getattr(again, field) == getattr(DEFAULTS, field), field
