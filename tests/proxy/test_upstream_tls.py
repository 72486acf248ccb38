"""TLS to providers: who is trusted, what is refused, and sessions taken up again.

An authority and its certificates are made by the `openssl` program in a temporary folder.
"""

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest

from accounting.contract.catalogue import CatalogueError
from accounting.contract.settings import Settings
from proxy import upstream
from proxy.metrics import CELLS
from proxy.upstream import Upstreams
from tests.proxy import harness
from tests.proxy.ends import Answer, Provider, chat, http, plain, request, usage
from tests.proxy.harness import Scene, Start
from tests.proxy.test_upstream_pool import User, provider
from tests.waiting import eventually

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="needs the openssl program")

NAME = "provider.test"
LONG_AGO = "20200101000000Z", "20200102000000Z"
CONFIGURATION = """
[ca]
default_ca = own
[own]
dir = .
database = index
serial = serial
new_certs_dir = .
default_md = sha256
policy = any
unique_subject = no
copy_extensions = copy
[any]
commonName = supplied
"""


class Authority:
    """Signs certificates; `path` is its own."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder / name
        self._folder.mkdir()
        self.path = self._folder / "ca.pem"
        (self._folder / "index").touch()
        (self._folder / "serial").write_text("01")
        (self._folder / "ca.cnf").write_text(CONFIGURATION)
        self._openssl(f"req -x509 {KEY} -keyout ca.key -out ca.pem -days 1 -subj /CN={name}")

    def _openssl(self, arguments: str) -> None:
        done = subprocess.run(
            ["openssl", *arguments.split()], cwd=self._folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    def context(self, names: str, between: tuple[str, str] | None = None) -> ssl.SSLContext:
        """A server's context with a certificate for `names` (`DNS:…,IP:…`)."""
        self._openssl(
            f"req {KEY} -keyout key.pem -out wish.pem -subj /CN=x -addext subjectAltName={names}"
        )
        dates = "-days 1" if between is None else f"-startdate {between[0]} -enddate {between[1]}"
        own = "-config ca.cnf -cert ca.pem -keyfile ca.key"
        self._openssl(f"ca -batch -notext {own} {dates} -in wish.pem -out cert.pem")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._folder / "cert.pem", self._folder / "key.pem")
        return context


KEY = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"


class TlsProvider(Provider):
    """A provider behind TLS; `resumed` says of each connection whether its session was known."""

    def __init__(self, context: ssl.SSLContext | None) -> None:
        super().__init__()
        self._context = context

    async def start(self) -> Self:
        self._server = await asyncio.start_server(self._called, "127.0.0.1", 0, ssl=self._context)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    @property
    def resumed(self) -> list[bool]:
        return [one.writer.get_extra_info("ssl_object").session_reused for one in self._all]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"), "trusted")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"), "stranger")


@pytest.fixture
def secure(
    start: Start, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """`await secure(context)`: a scene whose model `secure` is served by a TLS provider."""
    real = upstream.resolve

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"] if host == NAME else await real(host, port)

    async def begin(
        context: ssl.SSLContext, ca_file: Path | None = None, **settings: Any
    ) -> tuple[Scene, TlsProvider]:
        there = await TlsProvider(context).start()
        base_url = f"https://{NAME}:{there.port}/v1"
        entry = f'[providers.tls]\nbase_url = "{base_url}"\nca_file = "{ca_file or authority.path}"'
        monkeypatch.setattr(harness, "CATALOGUE", f"{harness.CATALOGUE}\n{entry}\n")
        monkeypatch.setitem(harness.MODELS, "secure", ["tls/there"])
        monkeypatch.setitem(harness.MODELS, "secure-pair", ["tls/there", "spare/pair-spare"])
        scene = await start(**settings)
        for pool in scene.services.upstreams.pools.values():
            pool._resolve = resolve
        scene._stack.push_async_callback(there.stop)
        return scene, there

    return begin


async def served(scene: Scene, there: TlsProvider, **headers: str) -> Answer:
    """One answer on a connection of its own."""
    client = await scene.client()
    client >> request(scene.seeds.key().secret, chat(model="secure"))
    call = await there.call()
    asked = await call.hears()
    assert asked.headers["host"] == f"{NAME}:{there.port}"
    call >> http(200, plain("secret", usage(1, 1)).partition(b"\r\n\r\n")[2], **headers)
    return await client.answer()


def failures(scene: Scene) -> int:
    cells = scene.services.counters.cells
    return int(cells[CELLS["tollgate_upstream_tls_failures", ""]])


async def test_a_trusted_provider_serves(secure: Any, authority: Authority) -> None:
    scene, there = await secure(authority.context(f"DNS:{NAME}"))
    answer = await served(scene, there)
    assert answer.status == 200 and b"secret" in answer.body
    call = there._all[0].writer
    assert call.get_extra_info("ssl_object").selected_alpn_protocol() in (None, "http/1.1")
    assert failures(scene) == 0


UNTRUSTED = ["other name", "unknown authority", "expired", "not yet valid", "self-signed"]


def untrusted(why: str, authority: Authority, stranger: Authority) -> ssl.SSLContext:
    match why:
        case "other name":
            return authority.context("DNS:other.test,IP:127.0.0.1")
        case "unknown authority":
            return stranger.context(f"DNS:{NAME}")
        case "expired":
            return authority.context(f"DNS:{NAME}", LONG_AGO)
        case "not yet valid":
            return authority.context(f"DNS:{NAME}", ("20990101000000Z", "20990102000000Z"))
        case _:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(stranger.path, stranger.path.with_name("ca.key"))
            return context


@pytest.mark.parametrize("why", UNTRUSTED)
async def test_who_cannot_be_trusted_is_refused(
    secure: Any, authority: Authority, stranger: Authority, why: str, capfd: Any
) -> None:
    scene, there = await secure(untrusted(why, authority, stranger))
    key = scene.seeds.key()
    for number in (1, 2):
        answer = await scene.ask(key, chat(model="secure"))
        assert answer.refused == (502, "provider_unreachable")
        assert "certificate" not in answer.body.decode()
        assert failures(scene) == number
    assert not there._all  # no handshake was completed, and nothing was said without one
    assert [event.charge_ucr for event in await scene.events(key)] == [0, 0]
    said = [line for line in capfd.readouterr().err.splitlines() if "not trusted" in line]
    assert len(said) == 1 and '"provider":"tls"' in said[0]


async def test_an_untrusted_provider_is_a_failed_target(secure: Any, stranger: Authority) -> None:
    scene, _ = await secure(stranger.context(f"DNS:{NAME}"))
    answer = await scene.ask(scene.seeds.key(), chat(model="secure-pair"))
    assert (answer.status, answer.headers["x-fallback-from"]) == (200, "there")


async def test_nothing_is_said_in_clear(secure: Any) -> None:
    """A provider that has lost its TLS hears a handshake and never a request."""
    scene, there = await secure(None)
    client = await scene.client()
    client >> request(scene.seeds.key().secret, chat(model="secure"))
    call = await there.call()
    await call.more()
    call >> http(200, b"{}")
    assert (await client.answer()).refused == (502, "provider_unreachable")
    heard = bytes(call.buffer)
    assert heard[:2] == b"\x16\x03"  # a TLS handshake record
    assert b"POST" not in heard and harness.PROVIDER_KEY.encode() not in heard
    assert there.calls == 1 and failures(scene) == 1


async def test_a_handshake_that_never_ends_has_the_time_out_of_connecting(secure: Any) -> None:
    scene, there = await secure(None, connect_timeout_seconds=0.2)
    answer = await scene.ask(scene.seeds.key(), chat(model="secure"))
    assert answer.refused == (502, "provider_unreachable")
    assert there.calls == 1


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_sessions_are_taken_up_again(
    secure: Any, authority: Authority, version: ssl.TLSVersion
) -> None:
    context = authority.context(f"DNS:{NAME}")
    context.minimum_version = context.maximum_version = version
    scene, there = await secure(context)
    for _ in range(4):
        assert (await served(scene, there, connection="close")).status == 200
    assert there.resumed == [False, True, True, True]


async def test_a_server_that_forgot_the_session_is_met_anew(
    secure: Any, authority: Authority
) -> None:
    scene, there = await secure(authority.context(f"DNS:{NAME}"))
    assert (await served(scene, there, connection="close")).status == 200
    port = there.port
    await there.stop()
    there._context = authority.context(f"DNS:{NAME}")
    there._server = await asyncio.start_server(there._called, "127.0.0.1", port, ssl=there._context)
    assert (await served(scene, there, connection="close")).status == 200
    assert (await served(scene, there)).status == 200
    assert there.resumed == [False, False, True]


async def test_a_resumed_session_is_of_the_same_name_only(
    authority: Authority,
) -> None:
    """The certificate is not looked at again; so what was verified for one name is offered to
    no other, though the address be the same."""
    there = await TlsProvider(authority.context(f"DNS:{NAME}")).start()
    why: list[str] = []
    upstreams = Upstreams(
        Settings(), lambda name, text, before: why.append(text), lambda *_: _loopback()
    )
    ca_file = str(authority.path)
    names = (NAME, "other.test")
    upstreams.add(
        provider(host, there.port, name=host, tls=True, ca_file=ca_file) for host in names
    )
    for host in names:
        user = User()
        upstreams.pools[host].acquire(user)
        await eventually(lambda user=user: user.connection or user.refusal)
        assert (user.refusal is None) == (host == NAME)
    assert len(why) == 1 and "other.test" in why[0]
    upstreams.close()
    await there.stop()
    await eventually(lambda: not any(pool._open for pool in upstreams.pools.values()))


async def _loopback() -> list[str]:
    return ["127.0.0.1"]


@pytest.mark.parametrize("kind", ["missing", "empty", "no certificate", "folder"])
async def test_a_ca_file_that_cannot_be_used_refuses_the_catalogue(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "ca.pem"
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_text("" if kind == "empty" else "hello\n")
    upstreams = Upstreams(Settings(), lambda *_: None)
    with pytest.raises(CatalogueError, match=r"provider 'p': ca_file .*ca\.pem: "):
        upstreams.add([provider(tls=True, ca_file=str(path))])
