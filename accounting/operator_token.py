"""The operator's bearer token: the one that was set, else one made in the data directory.

Several processes may ask at the same time on a fresh machine; all get the same token.
"""

import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

from accounting.contract.settings import Secret, Settings, SettingsError

_FILE = "operator_token"


def operator_token(settings: Settings) -> Secret:
    """The token, made in `<data_dir>/operator_token` (mode 0600) when none is set or there.

    Raises SettingsError when it cannot be kept there or cannot be sent in a header.
    """
    if settings.operator_token:
        return _usable("TOLLGATE_OPERATOR_TOKEN", settings.operator_token.reveal())
    path = Path(settings.data_dir) / _FILE
    try:
        if not path.exists():
            _make(path)
        return _usable(str(path), path.read_text("utf-8").strip())
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"TOLLGATE_DATA_DIR: operator token: {error}") from None


def _make(path: Path) -> None:
    """Write beside it and link: the first one wins, and nobody reads half a token."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=_FILE)  # mode 0600
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
        with suppress(FileExistsError):
            os.link(draft, path)
    finally:
        os.unlink(draft)


def _usable(where: str, token: str) -> Secret:
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise SettingsError(f"{where}: expected printable ASCII without spaces")
    return Secret(token)
