"""The compiled form of the hot path: found when it fits the sources, and only then."""

import ast
import importlib.util
import os
from pathlib import Path

import pytest

from proxy import compiled

PROXY = Path(__file__).parents[2] / "proxy"


@pytest.mark.parametrize("name", compiled.MODULES)
def test_what_is_compiled_defines_nothing_to_be_decoded(name: str) -> None:
    """mypyc forgets the annotations by which msgspec reads a type."""
    tree = ast.parse((PROXY / f"{name}.py").read_text())
    bases = [ast.unparse(base) for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
             for base in node.bases]  # fmt: skip
    assert not any("Struct" in base or "asyncio" in base for base in bases), bases


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(compiled, "_FOLDERS", tmp_path / "compiled")
    return tmp_path / "compiled"


def test_without_a_build_nothing_changes(folders: Path) -> None:
    assert compiled.environment(True) == {}


def test_a_build_that_was_broken_off_is_not_used(folders: Path) -> None:
    compiled.folder().mkdir(parents=True)
    assert compiled.environment(True) == {}


@pytest.mark.interpreted
def test_a_whole_build_comes_first_unless_turned_off(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    compiled.folder().mkdir(parents=True)
    (compiled.folder() / "whole").touch()
    found = compiled.environment(True)
    assert found["PYTHONPATH"].split(os.pathsep) == [
        str(compiled.folder()), str(PROXY.parent), "/elsewhere",
    ]  # fmt: skip
    assert found["PYTHONSAFEPATH"] == "1"  # or the working directory would come before it
    assert compiled.environment(False) == {}


@pytest.mark.interpreted
def test_other_sources_need_another_build(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = compiled.folder()
    before.mkdir(parents=True)
    (before / "whole").touch()
    copy = tmp_path / "sources"
    for source in compiled._python_files():
        target = copy / source.relative_to(PROXY.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    monkeypatch.setattr(compiled, "_SOURCES", copy)
    assert compiled.folder() == before
    (copy / "proxy" / "bill.py").write_text("# changed")
    assert compiled.folder() != before and compiled.environment(True) == {}


def test_without_a_compiler_it_says_so(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    assert compiled.main() == 3
    assert capsys.readouterr().err == (
        "tollgate: the hot path stays interpreted: no C compiler was found\n"
    )
    assert not folders.exists()


def test_this_run_is_what_it_says() -> None:
    """`make test` runs these tests a second time, compiled."""
    found = importlib.util.find_spec("proxy.exchange")
    assert found is not None and found.origin is not None
    asked = os.environ.get("COMPILED_PROXY", "")
    assert found.origin.endswith(".py") is not bool(asked)
    assert found.origin.startswith(asked)
