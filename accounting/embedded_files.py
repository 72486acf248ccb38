"""The files of one embedded server below the data directory.

For a server `redis`: its own folder `redis/`, and beside it `redis.password` (mode 0600,
generated once), `redis.port` (that of the last start, used again while it is free),
`redis.log` and `redis.lock`.

The lock is inherited by the server itself, so it is held exactly as long as the server lives,
even when the process that started it was killed: a second server can never touch the data.
Running servers is `embedded.py`'s part.
"""

import fcntl
import os
import secrets
import socket
import tempfile
import time
from pathlib import Path

LOOPBACK = "127.0.0.1"
_LOCK_TIMEOUT_SECONDS = 5.0  # a server whose starter was killed needs a moment to finish
_POLL_SECONDS = 0.02


class EmbeddedError(Exception):
    """An embedded server could not be started; the text is one line for the terminal."""


class Place:
    """The files of one server below the data directory."""

    def __init__(self, data_dir: Path, name: str) -> None:
        self._name = name
        self._data_dir = data_dir.resolve()
        try:
            self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise EmbeddedError(f"{data_dir} cannot be created: {error.strerror}") from error
        self.folder = self._data_dir / name
        self.log = self._file("log")

    def _file(self, suffix: str) -> Path:
        return self._data_dir / f"{self._name}.{suffix}"

    def lock(self) -> int:
        """Take the server's lock and return its descriptor, to be passed on to the server."""
        try:
            lock = os.open(self._file("lock"), os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise EmbeddedError(f"{self._file('lock')}: {error.strerror}") from error
        deadline = time.monotonic() + _LOCK_TIMEOUT_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(lock)
                    raise EmbeddedError(
                        f"{self.folder} is in use: is another tollgate running there?"
                    ) from None
            time.sleep(_POLL_SECONDS)

    def password(self) -> str:
        """The server's password, generated on first use."""
        path = self._file("password")
        if not path.exists():
            write_private(path, secrets.token_hex(24))
        return path.read_text().strip()

    def port(self) -> int:
        """The port of the last start if it is still free, else any free one, remembered."""
        path = self._file("port")
        if path.exists() and is_free(int(path.read_text())):
            return int(path.read_text())
        with socket.create_server((LOOPBACK, 0)) as listener:
            port = int(listener.getsockname()[1])
        write_private(path, str(port))
        return port

    def note_url(self, url: str) -> None:
        """Leave word of where the server listens, for other processes of the same owner."""
        write_private(self._file("url"), url)


def noted_url(data_dir: Path, name: str) -> str:
    """Where the embedded server `name` of a data directory listened last; empty if never."""
    path = data_dir / f"{name}.url"
    return path.read_text().strip() if path.exists() else ""


def write_private(path: Path, text: str) -> None:
    """Write a file of mode 0600 in one step: a reader sees all of it or none."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # mode 0600
    with open(descriptor, "w") as file:
        file.write(text + "\n")
    os.replace(name, path)


def is_free(port: int) -> bool:
    try:
        socket.create_server((LOOPBACK, port)).close()
    except OSError:
        return False
    return True
