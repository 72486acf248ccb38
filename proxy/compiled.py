"""The hot path compiled from its own Python sources: an option, found when it fits.

`python -m proxy.compiled` translates the modules below to C with mypyc and compiles them into
a folder of the virtual environment, named after a digest of the sources it was made from. A
worker runs from the folder that fits the sources it would otherwise read, if there is one: so
nothing stale is ever run, and without a C compiler everything works as it does here.

Left out are modules that define what msgspec decodes (mypyc forgets how a type is annotated),
and those that are not on the way of every request.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

MODULES = (
    "admission", "answer", "bill", "chunked", "cooldown", "exchange", "front_door", "http_head",
    "journal", "key_lease", "keys", "leases", "patience", "provider_usage", "relay",
    "repeated_head", "replies", "request_head", "request_ids", "request_reader", "routing",
    "services", "settlement", "sse", "turn_end", "usage_scanner","upstream", "upstream_connection",
)  # fmt: skip
_SOURCES = Path(__file__).parents[1]
_FOLDERS = Path(sys.prefix) / "lib" / "tollgate-compiled"
_SECONDS = 900.0


def folder() -> Path:
    """Where the compiled form of these sources is, or would be."""
    digest = hashlib.sha256(sys.version.encode())
    for source in _python_files():
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return _FOLDERS / digest.hexdigest()[:16]


def environment(enabled: bool) -> dict[str, str]:
    """What a process needs in its environment to run from the compiled form, if there is one."""
    if not (enabled and _is_whole(folder())):
        return {}
    path = [str(folder()), str(_SOURCES), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONSAFEPATH": "1"}


def is_running() -> bool:
    """Whether this process runs the compiled form."""
    module = sys.modules.get("proxy.exchange")
    return module is not None and not str(module.__file__).endswith(".py")


class NothingToCompileWith(OSError):
    """This machine has no C compiler, or Python came without its headers."""


def build() -> Path:
    """Compile, unless that has been done.

    Raises NothingToCompileWith, or OSError where it failed, with one line that says why.
    """
    target = folder()
    if _is_whole(target):
        return target
    if not any(shutil.which(name) for name in (os.environ.get("CC") or "cc", "gcc", "clang")):
        raise NothingToCompileWith("no C compiler was found")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        raise NothingToCompileWith("Python's headers are not installed")
    _FOLDERS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_FOLDERS, prefix="building-") as name:
        work = Path(name) / "work"
        for source in _python_files():
            copy = work / source.relative_to(_SOURCES)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
        (work / "accounting" / "__init__.py").touch()
        _compile(work)
        shutil.rmtree(work / "build")
        shutil.rmtree(work / "accounting")  # read where it is: only the types were needed
        (work / "whole").touch()
        for old in _FOLDERS.iterdir():
            if old != Path(name):
                shutil.rmtree(old, ignore_errors=True)
        work.rename(target)
    return target


def _compile(work: Path) -> None:
    command = [sys.executable, "-m", "mypyc", *(f"proxy/{name}.py" for name in MODULES)]
    environment = {**os.environ, "MYPYPATH": str(work), "PYTHONSAFEPATH": ""}
    done = subprocess.run(
        command, cwd=work, env=environment, capture_output=True, text=True, timeout=_SECONDS,
        check=False,
    )  # fmt: skip
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines() or ["no reason given"]
        why = [line for line in lines if "error" in line.lower()] or lines[-1:]
        raise OSError(f"mypyc failed: {why[0][:300]}")


def _python_files() -> list[Path]:
    return sorted(
        [*(_SOURCES / "proxy").glob("*.py"), *(_SOURCES / "accounting" / "contract").rglob("*.py")]
    )


def _is_whole(found: Path) -> bool:
    return (found / "whole").exists()


def main() -> int:
    """Compile, and print where to. The exit code is 3 where there is nothing to do it with."""
    try:
        found = build()
    except (OSError, subprocess.TimeoutExpired) as error:
        sys.stderr.write(f"tollgate: the hot path stays interpreted: {error}\n")
        return 3 if isinstance(error, NothingToCompileWith) else 1
    sys.stdout.write(f"{found}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
