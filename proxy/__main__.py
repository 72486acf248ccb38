"""`python -m proxy`: the supervisor and its workers, against a given Redis."""

import asyncio
import sys

from accounting.contract.settings import Settings, SettingsError, load
from proxy.fleet import StartError
from proxy.supervisor import Supervisor


def main() -> int:
    try:
        settings = load()
    except SettingsError as error:
        return _fail(str(error), 2)
    if not settings.redis_url:
        return _fail("TOLLGATE_REDIS_URL: needed when the proxy runs alone", 2)
    try:
        asyncio.run(_serve(settings))
    except StartError as error:
        return _fail(f"proxy: {error}", 1)
    except OSError as error:
        return _fail(f"proxy: {error.strerror or error}", 1)
    return 0


async def _serve(settings: Settings) -> None:
    await Supervisor(settings).run()


def _fail(why: str, code: int) -> int:
    sys.stderr.write(f"tollgate: {why}\n" if code == 2 else f"tollgate {why}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
