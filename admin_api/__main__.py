"""`python -m admin_api`: serve on TOLLGATE_ADMIN_LISTEN until SIGTERM or SIGINT.

Exit status: 0 after an orderly stop; with one line on stderr, 2 for a bad setting and 1 when a
store or the address cannot be had.
"""

import asyncio
import logging
import signal
import sys

import uvloop

from accounting import log_lines
from accounting.contract.settings import Settings, SettingsError, load
from accounting.stores import StoreError
from admin_api.app import serving

_log = logging.getLogger("tollgate.admin_api")


def main() -> int:
    try:
        settings = load()
        uvloop.run(serve(settings))
    except SettingsError as error:
        return _fail(f"tollgate: {error}", 2)
    except StoreError as error:
        return _fail(f"tollgate admin_api: {error}", 1)
    except OSError as error:
        why = error.strerror or error
        return _fail(f"tollgate admin_api: cannot listen on {settings.admin_listen}: {why}", 1)
    return 0


async def serve(settings: Settings) -> None:
    """Serve until a signal asks to stop. Raises what `serving` raises."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with serving(settings) as port:
        log_lines.start()
        _log.info("listening on %s, port %d", settings.admin_listen.host, port)
        await stop.wait()
        _log.info("stopping")
    _log.info("stopped")


def _fail(text: str, status: int) -> int:
    sys.stderr.write(" ".join(text.split()) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
