"""`python -m benchmarks.provider`: the stand-in provider as a process, or several.

Owns the command line, the worker processes and their end. With `--workers N` each
worker listens on the same port (SO_REUSEPORT) and leaves when its parent does.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import socket
import sys

import uvloop

from benchmarks.provider import DEFAULT_SCRIPT, ScriptError, StandInProvider, amended

GC_THRESHOLDS = (50_000, 50, 50)


def main() -> None:
    """Serve until SIGTERM or SIGINT; exit status 1 if the address cannot be used."""
    options = parsed_options()
    host, _, port = options.listen.rpartition(":")
    try:
        if options.workers == 1:
            uvloop.run(serve(options, host, int(port), reuse_port=False, parent=None))
        else:
            serve_with_workers(options, host, int(port))
    except OSError as problem:
        sys.exit(f"cannot listen on {options.listen}: {problem.strerror}")


def parsed_options() -> argparse.Namespace:
    """The command line; exits with a usage message if it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.provider")
    parser.add_argument("--listen", default="127.0.0.1:8090", metavar="HOST:PORT")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--api-key", help="refuse every other bearer token with 401")
    parser.add_argument(
        "--script", default="", metavar="K=V;K=V", help="default script of every request"
    )
    options = parser.parse_args()
    if not options.listen.rpartition(":")[2].isdigit() or options.workers < 1:
        parser.error("--listen takes HOST:PORT and --workers a number from 1")
    try:
        options.default_script = amended(DEFAULT_SCRIPT, options.script)
    except ScriptError as problem:
        parser.error(f"--script: {problem}")
    return options


async def serve(
    options: argparse.Namespace, host: str, port: int, *, reuse_port: bool, parent: int | None
) -> None:
    """One process: serve until told to stop, or until the pipe to the parent closes."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    if parent is not None:
        loop.add_reader(parent, stopped.set)
    provider = StandInProvider(
        host,
        port,
        options.api_key,
        default_script=options.default_script,
        recorded=0,
        reuse_port=reuse_port,
    )
    async with provider:
        if parent is None:
            announce(host, provider.port)
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        await stopped.wait()


def announce(host: str, port: int) -> None:
    """The one line a starter waits for."""
    print(f"listening on http://{host}:{port}", flush=True)


def serve_with_workers(options: argparse.Namespace, host: str, port: int) -> None:
    """Fork the workers, wait for a signal or for all of them to end, stop them."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as reservation:
        # Bound but not listening: keeps the port for the workers and gets no connections.
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reservation.bind((host.strip("[]"), port))
        port = reservation.getsockname()[1]
        alive, keep = os.pipe()
        workers = [fork_worker(options, host, port, alive, keep) for _ in range(options.workers)]
        os.close(alive)

        def stop_workers(*_: object) -> None:
            for pid in workers:
                os.kill(pid, signal.SIGTERM)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop_workers)
        announce(host, port)
        while workers:
            workers.remove(os.wait()[0])


def fork_worker(options: argparse.Namespace, host: str, port: int, alive: int, keep: int) -> int:
    """Start one worker process; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    os.close(keep)
    uvloop.run(serve(options, host, port, reuse_port=True, parent=alive))
    os._exit(0)


if __name__ == "__main__":
    main()
