"""Every setting, once: name, type, default, bounds and meaning; read from the environment.

A field `listen` is the variable `TOLLGATE_LISTEN`. An unknown `TOLLGATE_*` variable or a
value outside its bounds raises `SettingsError`, whose text starts with the variable's name.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, get_args, get_type_hints

import msgspec
from msgspec import Meta, Struct

PREFIX = "TOLLGATE_"
SHARDS = 64


class SettingsError(ValueError):
    """A variable is unknown or out of bounds; the text is fit for one line on stderr."""


class Secret:
    """A string that is never printed, logged or compared by accident."""

    __slots__ = ("_value",)

    def __init__(self, value: str = "") -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __bool__(self) -> bool:
        return bool(self._value)

    def __repr__(self) -> str:
        return "Secret(set)" if self._value else "Secret(empty)"


class Address(Struct, frozen=True):
    """Where a listener binds: a host name or IP address, and a TCP port (0 = any free)."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


_ADDRESS = re.compile(
    r"(?:\[(?P<six>[0-9A-Za-z.%_-]*:[0-9A-Za-z:.%_-]*)\]|(?P<host>[0-9A-Za-z._-]+))"
    r":(?P<port>[0-9]{1,5})"
)


def parse_address(text: str) -> Address:
    """`127.0.0.1:8080`, `[::1]:8080` or `localhost:0`; ValueError when it is none of these."""
    found = _ADDRESS.fullmatch(text)
    if not found or int(found["port"]) > 65535:
        raise ValueError("expected HOST:PORT or [IPV6]:PORT")
    return Address(found["six"] or found["host"], int(found["port"]))


def _between(low: float, high: float, meaning: str) -> Meta:
    return Meta(ge=low, le=high, description=meaning)


def _text(meaning: str, pattern: str | None = None) -> Meta:
    return Meta(description=meaning, pattern=pattern)


_REDIS_URL = r"((rediss?|unix)://[!-~]+)?"
_DATABASE_URL = r"(postgres(ql)?://[!-~]+)?"
_BEARER = r"[!-~]*"
_USD = r"\A[0-9]{1,6}(\.[0-9]{1,8})?\Z"
MIB = 1024 * 1024
DAY = 86_400


class Settings(Struct, frozen=True, kw_only=True):
    """All settings of all processes; see each field's description for unit and meaning."""

    listen: Annotated[Address, _text("public listener: clients")] = Address("127.0.0.1", 8080)
    admin_listen: Annotated[Address, _text("account and operator API")] = Address("127.0.0.1", 8081)
    private_listen: Annotated[Address, _text("probes and metrics: /healthz /readyz /metrics")] = (
        Address("127.0.0.1", 8082)
    )
    workers: Annotated[int, _between(0, 256, "proxy worker processes; 0 = one per core")] = 0
    redis_url: Annotated[Secret, _text("redis://… ; empty = an embedded Redis", _REDIS_URL)] = (
        Secret()
    )
    database_url: Annotated[
        Secret, _text("postgresql://… ; empty = an embedded PostgreSQL", _DATABASE_URL)
    ] = Secret()
    catalogue: Annotated[
        str, _text("path of the catalogue (TOML); empty = the starter catalogue")
    ] = ""
    operator_token: Annotated[
        Secret, _text("bearer token of /v1/admin; empty = made in the data directory", _BEARER)
    ] = Secret()
    data_dir: Annotated[
        str, _text("where embedded servers, journals and the operator token live")
    ] = ".tollgate"
    compiled: Annotated[bool, _text("run workers compiled, where `make compiled` was made")] = True
    sandbox: Annotated[bool, _text("offer the catalogue's sandbox provider and its models")] = False

    head_limit_bytes: Annotated[int, _between(1024, MIB, "largest request head; beyond it 431")] = (
        32_768
    )
    body_limit_bytes: Annotated[
        int, _between(1024, 512 * MIB, "largest request body; beyond it 413")
    ] = 20 * MIB
    answer_limit_bytes: Annotated[
        int, _between(1024, 512 * MIB, "largest non-streamed provider answer")
    ] = 32 * MIB
    event_limit_bytes: Annotated[
        int, _between(1024, 64 * MIB, "largest single event of a stream")
    ] = 8 * MIB
    write_buffer_bytes: Annotated[
        int, _between(4096, 64 * MIB, "unsent bytes per client, or one read; upstream then pauses")
    ] = 262_144
    connections: Annotated[
        int, _between(1, 1_000_000, "open client connections per worker; beyond it 503")
    ] = 20_000
    pipeline_depth: Annotated[
        int, _between(1, 1024, "requests read ahead of an answer on one connection")
    ] = 16
    head_timeout_seconds: Annotated[
        float, _between(0.1, 600, "from a head's first byte to its last")
    ] = 10.0
    body_timeout_seconds: Annotated[
        float, _between(0.1, 3600, "for a request body to arrive in full")
    ] = 60.0
    idle_timeout_seconds: Annotated[
        float, _between(0.1, 3600, "a connection between two requests")
    ] = 75.0
    stalled_client_seconds: Annotated[
        float, _between(0.1, 3600, "a client that reads nothing of its answer")
    ] = 60.0
    drain_timeout_seconds: Annotated[
        float, _between(0, 3600, "streams may go on this long in a worker that stops or is rolled")
    ] = 30.0
    drain_idle_seconds: Annotated[
        float, _between(0, 3600, "its idle connections may ask once more for this long")
    ] = 5.0
    start_timeout_seconds: Annotated[
        float, _between(0.1, 600, "a worker's successor has to get ready; else the worker stays")
    ] = 30.0

    connect_timeout_seconds: Annotated[
        float, _between(0.05, 120, "to open a connection to a provider")
    ] = 5.0
    first_byte_timeout_seconds: Annotated[
        float, _between(0.05, 3600, "for a provider to start its answer")
    ] = 120.0
    chunk_timeout_seconds: Annotated[
        float, _between(0.05, 3600, "silence between two chunks of an answer")
    ] = 60.0
    total_timeout_seconds: Annotated[
        float, _between(0.05, DAY, "one exchange from admission to its end")
    ] = 900.0
    upstream_connections: Annotated[
        int, _between(1, 100_000, "open connections per provider and worker")
    ] = 2_000
    upstream_waiting: Annotated[
        int, _between(0, 100_000, "exchanges waiting for one of them; beyond it 503")
    ] = 1_000
    upstream_idle_seconds: Annotated[
        float, _between(0.1, 3600, "an unused provider connection is kept")
    ] = 30.0
    upstream_age_seconds: Annotated[
        float, _between(1, DAY, "a provider connection is used again; then its name is looked up")
    ] = 600.0
    cooldown_window_seconds: Annotated[
        float, _between(0.1, 3600, "a target's failures are counted this long")
    ] = 30.0
    cooldown_failures: Annotated[
        int, _between(1, 100_000, "failures in the window before a target is passed over")
    ] = 5
    cooldown_rate: Annotated[
        float, _between(0.01, 1, "the share of a target's attempts that must have failed, too")
    ] = 0.5
    cooldown_seconds: Annotated[
        float, _between(0.01, 3600, "a target is first passed over; doubled by a failed probe")
    ] = 5.0
    cooldown_limit_seconds: Annotated[
        float, _between(0.01, DAY, "a target is passed over at most, also by its Retry-After")
    ] = 300.0

    redis_timeout_seconds: Annotated[
        float, _between(0.01, 30, "for a reply from Redis; then 503")
    ] = 0.2
    redis_pending: Annotated[
        int, _between(16, 1_000_000, "commands awaiting a reply per worker; then 503")
    ] = 20_000
    key_cache_entries: Annotated[int, _between(16, 10_000_000, "key records kept per worker")] = (
        50_000
    )
    key_cache_seconds: Annotated[float, _between(1, 3600, "a key record is kept unchecked")] = 300.0
    settle_interval_seconds: Annotated[
        float, _between(0.001, 1, "settles are gathered this long")
    ] = 0.01
    settle_batch: Annotated[int, _between(1, 4096, "settles sent to one shard in one call")] = 256
    journal_slots: Annotated[
        int, _between(64, 1_000_000, "live or unsettled exchanges per worker; then 503")
    ] = 32_768
    journal_sync_seconds: Annotated[
        float, _between(0.01, 3600, "between two writes of a worker's journal to the disk")
    ] = 0.1
    heartbeat_seconds: Annotated[float, _between(0.1, 60, "a worker says that it lives")] = 2.0
    reap_seconds: Annotated[
        float, _between(5, 7 * DAY, "a worker is silent; then its host is taken to be lost")
    ] = 900.0

    accounting_listen: Annotated[
        Address, _text("accounting's own /healthz and /metrics; tried again while it is taken")
    ] = Address("127.0.0.1", 8083)
    audit_seconds: Annotated[
        float,
        _between(
            0,
            7 * DAY,
            "accounting audits this often, everything at first and once a day, else what is new;"
            " 0 = never",
        ),
    ] = 300.0
    accounting_batch: Annotated[
        int, _between(1, 10_000, "stream entries posted in one transaction")
    ] = 500
    accounting_wait_seconds: Annotated[
        float, _between(0.01, 60, "a read of the stream waits for entries")
    ] = 1.0
    accounting_deliveries: Annotated[
        int, _between(1, 100, "tries before an entry goes to quarantine")
    ] = 5
    database_connections: Annotated[
        int, _between(1, 1_000, "pool of each accounting or admin process")
    ] = 8
    database_timeout_seconds: Annotated[float, _between(0.1, 600, "for one statement")] = 30.0
    trial_usd: Annotated[str, _text("trial credits of the demo, USD", _USD)] = "20"


def load(environ: Mapping[str, str] | None = None) -> Settings:
    """Read the environment. Raises SettingsError naming the variable at fault."""
    environ = os.environ if environ is None else environ
    kinds = get_type_hints(Settings, include_extras=True)
    names = {PREFIX + field.upper(): field for field in Settings.__struct_fields__}
    chosen: dict[str, Any] = {}
    for variable, text in environ.items():
        if not variable.startswith(PREFIX):
            continue
        if variable not in names:
            raise SettingsError(f"{variable}: unknown setting")
        chosen[names[variable]] = _parse(variable, text, kinds[names[variable]])
    return Settings(**chosen)


def _parse(variable: str, text: str, kind: Any) -> Any:
    base, meta = get_args(kind)[:2]
    if base is Secret:
        if not re.fullmatch(meta.pattern, text):
            raise SettingsError(f"{variable}: not a usable {meta.description.split(';')[0]}")
        return Secret(text)
    try:
        if base is Address:
            return parse_address(text)
        return msgspec.convert(text, kind, strict=False)
    except ValueError as error:
        raise SettingsError(f"{variable}: {str(error).lower()}") from None


def describe() -> Iterator[tuple[str, str, str]]:
    """Each setting as (variable, default, meaning with bounds): the README's table."""
    kinds = get_type_hints(Settings, include_extras=True)
    for field, default in zip(
        Settings.__struct_fields__, Settings.__struct_defaults__, strict=True
    ):
        meta = next(part for part in get_args(kinds[field])[1:] if isinstance(part, Meta))
        bounds = (
            f" ({meta.ge:g}–{meta.le:g})" if meta.ge is not None and meta.le is not None else ""
        )
        shown = "" if isinstance(default, Secret) else str(default)
        yield PREFIX + field.upper(), shown, f"{meta.description}{bounds}"
