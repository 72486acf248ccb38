"""One running stack for all journeys that are not about starting and stopping it.

It has two providers: the sandbox that `--sandbox` starts, and one inside the test process
that can be watched. After each test that took an account its books are proven, after each
journey the whole system's.
"""

from collections.abc import Iterator

import pytest

from tests.journeys.account import Account
from tests.journeys.running import Running
from tests.journeys.watched_provider import API_KEY, WatchedProvider
from tests.stack import Stack

_CATALOGUE = """
[providers.sandbox]
base_url = "http://127.0.0.1:{sandbox_port}/v1"
sandbox = true

[providers.watched]
base_url = "{watched_url}"
api_key_env = "WATCHED_API_KEY"

[providers.dead]
base_url = "http://127.0.0.1:1/v1"

[models.sandbox-small]
targets = ["sandbox/sandbox-small"]
context_tokens = 128000
max_output_tokens = 4096
price = {{ input = "15", cached_input = "7.5", output = "60" }}

[models.watched]
targets = ["watched/watched-2026-01-01"]
context_tokens = 128000
max_output_tokens = 4096
price = {{ input = "250", cached_input = "25", output = "1500" }}

[models.chained]
targets = ["dead/first-choice", "watched/second-choice"]
context_tokens = 128000
max_output_tokens = 4096
price = {{ input = "15", output = "60" }}
"""


@pytest.fixture(scope="session")
def watched_provider() -> Iterator[WatchedProvider]:
    provider = WatchedProvider()
    yield provider
    provider.stop()


@pytest.fixture(scope="session")
def running(
    tmp_path_factory: pytest.TempPathFactory, watched_provider: WatchedProvider
) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("journeys")
    stack = Stack(folder / "data")
    catalogue = folder / "journeys.toml"
    catalogue.write_text(
        _CATALOGUE.format(sandbox_port=stack.sandbox_port, watched_url=watched_provider.base_url)
    )
    stack.env |= {"TOLLGATE_CATALOGUE": str(catalogue), "WATCHED_API_KEY": API_KEY}
    try:
        yield Running(stack.start("--sandbox").until_ready())
    finally:
        stack.close()


@pytest.fixture(scope="module")
def journey(running: Running) -> Iterator[Running]:
    """The running stack; its audit has to be clean after the last test of a journey."""
    yield running
    running.audit()


@pytest.fixture
def provider(watched_provider: WatchedProvider) -> WatchedProvider:
    """The provider behind `watched` and `chained`, with nothing remembered."""
    watched_provider.forget()
    return watched_provider


@pytest.fixture
def account(journey: Running, request: pytest.FixtureRequest) -> Iterator[Account]:
    """A workspace without a credit; after the test its books are proven."""
    account = Account(journey, request.node.name[:100])
    yield account
    account.close()
    account.prove()


@pytest.fixture
def funded(account: Account) -> Account:
    """The same with ten dollars."""
    account.grant("10")
    return account
