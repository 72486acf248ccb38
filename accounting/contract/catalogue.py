"""Models, providers, prices and limits: data, proven on dummy usage at load.

A catalogue is refused as a whole, by the name of what is wrong: an unknown provider, a
missing price or key variable, a price that is negative, zero or finer than a µcr.
"""

import hashlib
import re
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import SplitResult, urlsplit

import msgspec
from msgspec import Meta, Struct

from accounting.contract.money import MAX_UCR, MoneyError, parse_credits
from accounting.contract.pricing import Price, Rates, cost_ucr, worst_case_ucr
from accounting.contract.settings import Secret
from accounting.contract.usage_event import TokenUsage


class CatalogueError(ValueError):
    """The catalogue cannot be used; the text names the provider or model at fault."""


class Provider(Struct, frozen=True):
    """A provider's endpoint and credential; time-outs in seconds, None = the setting's."""

    name: str
    host: str
    port: int
    tls: bool
    path: str
    api_key: Secret
    ca_file: str
    connect_timeout_seconds: float | None
    first_byte_timeout_seconds: float | None
    chunk_timeout_seconds: float | None
    total_timeout_seconds: float | None


class Target(Struct, frozen=True):
    """One way to serve a model: a provider, and the model's name there."""

    provider: Provider
    model: str

    def __str__(self) -> str:
        return f"{self.provider.name}/{self.model}"


class Model(Struct, frozen=True):
    """What clients ask for by name. Limits in tokens."""

    name: str
    targets: tuple[Target, ...]
    context_tokens: int
    max_output_tokens: int
    price: Price
    quoted: dict[str, Any]
    source: str
    source_date: str


class Catalogue(Struct, frozen=True):
    providers: dict[str, Provider]
    models: dict[str, Model]


_NAME_LIMIT = 100  # a journal's slot holds a model's name and its target's
_Tokens = Annotated[int, Meta(ge=1, le=100_000_000)]
_Seconds = Annotated[float, Meta(gt=0, le=86_400)]


class _LongTable(Struct, forbid_unknown_fields=True):
    above: _Tokens
    input: str
    output: str
    cached_input: str | None = None
    cache_write: str | None = None
    audio_input: str | None = None
    audio_output: str | None = None


class _PriceTable(Struct, forbid_unknown_fields=True):
    input: str
    output: str
    cached_input: str | None = None
    cache_write: str | None = None
    audio_input: str | None = None
    audio_output: str | None = None
    long: _LongTable | None = None


class _ProviderTable(Struct, forbid_unknown_fields=True):
    base_url: str
    api_key_env: str = ""
    optional: bool = False
    sandbox: bool = False
    ca_file: str = ""
    connect_timeout_seconds: _Seconds | None = None
    first_byte_timeout_seconds: _Seconds | None = None
    chunk_timeout_seconds: _Seconds | None = None
    total_timeout_seconds: _Seconds | None = None


class _ModelTable(Struct, forbid_unknown_fields=True):
    targets: Annotated[list[str], Meta(min_length=1, max_length=8)]
    context_tokens: _Tokens
    max_output_tokens: _Tokens
    price: _PriceTable
    source: str = ""
    source_date: str = ""


class _File(Struct, forbid_unknown_fields=True):
    providers: dict[str, dict[str, Any]]
    models: dict[str, dict[str, Any]]


def load(path: str, environ: Mapping[str, str], sandbox: bool) -> Catalogue:
    """Read and prove a catalogue; an empty path is the starter file. Raises CatalogueError."""
    try:
        text = Path(path).read_text("utf-8") if path else _starter()
    except (OSError, UnicodeDecodeError) as error:
        raise CatalogueError(f"catalogue {path}: {error}") from None
    return parse(text, environ, sandbox)


def _starter() -> str:
    return (resources.files(__package__) / "catalogue.toml").read_text("utf-8")


def parse(text: str, environ: Mapping[str, str], sandbox: bool) -> Catalogue:
    """Prove a catalogue given as TOML text. Raises CatalogueError."""
    try:
        file = msgspec.convert(tomllib.loads(text), _File)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise CatalogueError(f"catalogue: {error}") from None
    providers: dict[str, Provider | None] = {
        name: _provider(name, table, environ, sandbox) for name, table in file.providers.items()
    }
    models = {}
    for name, table in file.models.items():
        model = _model(name, table, providers)
        if model.targets:
            models[name] = model
    if not models:
        raise CatalogueError("catalogue: no model is live; set a provider's key variable")
    live = {name: provider for name, provider in providers.items() if provider is not None}
    return Catalogue(live, models)


def _provider(
    name: str, raw: dict[str, Any], environ: Mapping[str, str], sandbox: bool
) -> Provider | None:
    """None when the provider is not on offer: an optional one without its key."""
    where = f"catalogue: provider {name!r}"
    table = _convert(raw, _ProviderTable, where)
    url = _url(table.base_url, where)
    if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment:
        raise CatalogueError(f"{where}: base_url must be http(s)://host[:port]/path")
    if url.username or url.password:
        raise CatalogueError(f"{where}: base_url must not carry credentials")
    key = environ.get(table.api_key_env, "") if table.api_key_env else ""
    if not key.isascii() or not key.isprintable() or " " in key:
        raise CatalogueError(f"{where}: {table.api_key_env} is not a usable key")
    if table.sandbox and not sandbox:
        return None
    if table.api_key_env and not key:
        if table.optional:
            return None
        raise CatalogueError(f"{where}: {table.api_key_env} is not set")
    return Provider(
        name=name,
        host=url.hostname,
        port=_port(url, where),
        tls=url.scheme == "https",
        path=url.path.rstrip("/"),
        api_key=Secret(key),
        ca_file=table.ca_file,
        connect_timeout_seconds=table.connect_timeout_seconds,
        first_byte_timeout_seconds=table.first_byte_timeout_seconds,
        chunk_timeout_seconds=table.chunk_timeout_seconds,
        total_timeout_seconds=table.total_timeout_seconds,
    )


def _url(text: str, where: str) -> SplitResult:
    if not re.fullmatch(r"[!-~]+", text):
        raise CatalogueError(f"{where}: base_url must be printable ASCII without spaces")
    try:
        return urlsplit(text)
    except ValueError:
        raise CatalogueError(f"{where}: base_url is not a URL") from None


def _port(url: SplitResult, where: str) -> int:
    try:
        port = url.port
    except ValueError:
        port = 0
    if port == 0:
        raise CatalogueError(f"{where}: base_url has no valid port")
    return port or (443 if url.scheme == "https" else 80)


def _model(name: str, raw: dict[str, Any], providers: dict[str, Provider | None]) -> Model:
    where = f"catalogue: model {name!r}"
    if not name or not name.isascii() or not name.isprintable() or '"' in name or "\\" in name:
        raise CatalogueError(f"{where}: a name is printable ASCII without quotes")
    if len(name) > _NAME_LIMIT:
        raise CatalogueError(f"{where}: a name has {_NAME_LIMIT} characters at most")
    if "price" not in raw:
        raise CatalogueError(f"{where}: has no price")
    table = _convert(raw, _ModelTable, where)
    targets = [_target(text, providers, where) for text in table.targets]
    model = Model(
        name=name,
        targets=tuple(target for target in targets if target is not None),
        context_tokens=table.context_tokens,
        max_output_tokens=table.max_output_tokens,
        price=_price(table.price, where),
        quoted=raw["price"],
        source=table.source,
        source_date=table.source_date,
    )
    _prove(model, where)
    return model


def _target(text: str, providers: dict[str, Provider | None], where: str) -> Target | None:
    provider_name, slash, model = text.partition("/")
    if not slash or not model or not model.isascii() or not model.isprintable():
        raise CatalogueError(f"{where}: target {text!r} is not provider/model")
    if len(text) > _NAME_LIMIT:
        raise CatalogueError(f"{where}: a target has {_NAME_LIMIT} characters at most")
    if provider_name not in providers:
        raise CatalogueError(f"{where}: unknown provider {provider_name!r}")
    provider = providers[provider_name]
    return Target(provider, model) if provider is not None else None


def _price(table: _PriceTable, where: str) -> Price:
    base = _rates(table, where)
    long = _rates(table.long, where) if table.long else None
    above = table.long.above if table.long else 0
    digest = hashlib.sha256(msgspec.json.encode((base, above, long))).hexdigest()[:12]
    return Price(base, above, long, digest)


def _rates(table: _PriceTable | _LongTable, where: str) -> Rates:
    plain_input = _rate(table.input, where, "input")
    plain_output = _rate(table.output, where, "output")

    def optional(meter: str, otherwise: int) -> int:
        text = getattr(table, meter)
        return otherwise if text is None else _rate(text, where, meter)

    return Rates(
        input=plain_input,
        output=plain_output,
        cached_input=optional("cached_input", plain_input),
        cache_write=optional("cache_write", plain_input),
        audio_input=optional("audio_input", plain_input),
        audio_output=optional("audio_output", plain_output),
    )


def _rate(text: str, where: str, meter: str) -> int:
    try:
        rate = parse_credits(text)
    except MoneyError as error:
        raise CatalogueError(f"{where}: price {meter} {text!r}: {error}") from None
    if rate == 0:
        raise CatalogueError(f"{where}: price {meter} is zero; nothing is free by accident")
    return rate


def _prove(model: Model, where: str) -> None:
    """Price dummy usage on every meter: each costs something, none above the worst case."""
    most = worst_case_ucr(model.price, model.context_tokens, model.max_output_tokens, True)
    if most > MAX_UCR:
        raise CatalogueError(f"{where}: its worst case is beyond any balance")
    for usage in (
        TokenUsage(input=1),
        TokenUsage(output=1),
        TokenUsage(input=model.context_tokens, output=model.max_output_tokens),
        TokenUsage(input=model.context_tokens, cached_input=model.context_tokens),
        TokenUsage(input=model.context_tokens, cache_write=model.context_tokens),
        TokenUsage(input=model.context_tokens, audio_input=model.context_tokens),
        TokenUsage(output=model.max_output_tokens, audio_output=model.max_output_tokens),
    ):
        if not 0 < cost_ucr(model.price, usage) <= most:
            raise CatalogueError(f"{where}: price fails on dummy usage {usage}")


def _convert(raw: dict[str, Any], kind: type[Any], where: str) -> Any:
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise CatalogueError(f"{where}: {error}") from None
