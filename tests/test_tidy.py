"""The house rules as tests: layers, sans-IO files, lengths, names, words, settings, scripts.

Each rule is a function from one file to its complaints, and each is shown to fail on a bad
example at the end of this file, so that none of them can fall silent unnoticed.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest

from accounting.contract import settings

ROOT = Path(__file__).resolve().parents[1]

ROOT_FOLDERS = {"proxy", "accounting", "admin_api", "benchmarks", "tests", "grafana", ".ci"}
NOT_OURS = {"node_modules", "__pycache__", "build"}
TEXT_SUFFIXES = {".py", ".lua", ".sql", ".toml", ".md", ".yaml", ".yml", ".json", ".lock", ".mjs"}
TEXT_NAMES = {"Makefile", "run", ".gitignore"}

MAY_IMPORT = {  # the first-party packages each layer may know; the first match counts
    "accounting/contract/": ("accounting.contract",),
    "accounting/": ("accounting",),
    "proxy/": ("proxy", "accounting.contract"),
    "admin_api/": ("admin_api", "accounting"),
}
FIRST_PARTY = {"proxy", "accounting", "admin_api", "benchmarks", "tests"}
CONTRACT_NEEDS = {"msgspec", "redis"}
BUILT_IN_RUST = {"bcrypt", "cryptography", "jiter", "nh3", "orjson", "pydantic", "pydantic_core"}
BUILT_IN_RUST |= {"rpds", "tiktoken", "tokenizers", "watchfiles"}
SANS_IO = re.compile(
    r"proxy/(sse|request_head|request_reader|usage_scanner|provider_usage|chunked|admission|key_lease|http_\w+)\.py"
    r"|accounting/postings\.py|accounting/contract/(money|pricing|usage_event)\.py"
)
DOES_IO = {"aiohttp", "asyncio", "asyncpg", "redis", "select", "selectors", "socket", "ssl"}
DOES_IO |= {"subprocess", "threading", "uvloop"}

FUNCTION_LINES = 60
FILE_LINES = 350
TEST_FILE_LINES = 600
VAGUE_NAMES = {"common", "helper", "helpers", "manager", "misc", "util", "utils"}
# Written in two parts so that this file does not complain of itself.
UNFINISHED = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|NotImplemented" + r"Error)\b")
MACHINE_PATH = re.compile(r"(?<![\w.])/(wo" + r"rk|ro" + r"ot|ho" + r"me)/")
REGISTRY = re.compile(r"py" + r"pi\.org|python" + r"hosted\.org|npm" + r"js\.(org|com)")
ENTRY_POINT = re.compile(r"(\w+/)*__main__\.py|benchmarks/.*|tests/.*")
SETTING = re.compile(r"\bTOLLGATE_[A-Z0-9_]*[A-Z0-9]\b")
LONGEST_SLEEP_SECONDS = 0.1
LUA_HEADER = {"reply", "Invariant"}
LUA_ARGUMENT = re.compile(r"\b(?:KEYS|ARGV)\[\d+\]")


class File:
    """A file of the tree: its path relative to the root, its text and, for Python, its tree."""

    def __init__(self, path: str, text: str) -> None:
        self.path = path
        self.text = text
        self.tree = ast.parse(text) if path.endswith(".py") else ast.Module([], [])

    def walk(self, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
        return (node for node in ast.walk(self.tree) if isinstance(node, kinds))

    def imports(self) -> Iterator[str]:
        """Every imported module, absolute, with the names taken from it (`a.b` for both)."""
        package = PurePosixPath(self.path).parent.parts
        for node in self.walk(ast.Import, ast.ImportFrom):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) - node.level + 1] if node.level else ()
                module = ".".join((*above, *([node.module] if node.module else [])))
                yield from (f"{module}.{alias.name}" for alias in node.names)


Rule = Callable[[File], Iterator[str]]


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def layers(file: File) -> Iterator[str]:
    """proxy -> contract, admin_api -> accounting -> contract; nothing else."""
    allowed = next((MAY_IMPORT[top] for top in MAY_IMPORT if file.path.startswith(top)), None)
    for module in file.imports() if allowed else ():
        if module.split(".")[0] in FIRST_PARTY and not within(module, allowed or ()):
            yield f"imports {module}"


def contract_needs_little(file: File) -> Iterator[str]:
    """The contract is shared by all: the standard library, msgspec and redis only."""
    known = sys.stdlib_module_names | CONTRACT_NEEDS | FIRST_PARTY
    if file.path.startswith("accounting/contract/"):
        yield from (f"imports {name}" for name in file.imports() if name.split(".")[0] not in known)


def proxy_has_no_rust(file: File) -> Iterator[str]:
    """The hot path loads C and Cython only."""
    if file.path.startswith(("proxy/", "accounting/contract/")):
        names = (name for name in file.imports() if name.split(".")[0] in BUILT_IN_RUST)
        yield from (f"imports {name}" for name in names)


def sans_io_files_know_no_socket(file: File) -> Iterator[str]:
    """What decides on bytes and money is pure: no event loop, no connection."""
    if SANS_IO.fullmatch(file.path):
        names = (name for name in file.imports() if name.split(".")[0] in DOES_IO)
        yield from (f"imports {name}" for name in names)


def functions_are_short(file: File) -> Iterator[str]:
    for node in file.walk(ast.FunctionDef, ast.AsyncFunctionDef):
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        lines = (node.end_lineno or 0) - node.lineno + 1
        if lines > FUNCTION_LINES and not file.path.startswith("tests/"):
            yield f"{node.name} has {lines} lines, more than {FUNCTION_LINES}"


def files_are_short(file: File) -> Iterator[str]:
    limit = TEST_FILE_LINES if file.path.startswith("tests/") else FILE_LINES
    lines = file.text.count("\n")
    if file.path.endswith((".py", ".lua")) and lines > limit:
        yield f"has {lines} lines, more than {limit}"


def names_say_something(file: File) -> Iterator[str]:
    parts = PurePosixPath(file.path).with_suffix("").parts
    yield from (f"is called {part}" for part in parts if part in VAGUE_NAMES)


def modules_say_what_they_own(file: File) -> Iterator[str]:
    if file.tree.body and not ast.get_docstring(file.tree):
        yield "has no module docstring"


def nothing_is_unfinished(file: File) -> Iterator[str]:
    yield from (f"says {found[0]}" for found in UNFINISHED.finditer(file.text))


def only_entry_points_print(file: File) -> Iterator[str]:
    for node in file.walk(ast.Call):
        name = getattr(getattr(node, "func", None), "id", "")
        if name == "print" and not ENTRY_POINT.fullmatch(file.path):
            yield f"prints in line {getattr(node, 'lineno', 0)}"


def no_exception_is_swallowed(file: File) -> Iterator[str]:
    """`except …: pass` hides; `contextlib.suppress` of a named, narrow class is a decision."""
    for node in file.walk(ast.ExceptHandler):
        assert isinstance(node, ast.ExceptHandler)
        if all(isinstance(part, ast.Pass | ast.Expr) and _is_empty(part) for part in node.body):
            yield f"swallows an exception in line {node.lineno}"
    for node in file.walk(ast.Call):
        assert isinstance(node, ast.Call)
        broad = {ast.unparse(argument) for argument in node.args} & {"Exception", "BaseException"}
        if ast.unparse(node.func).endswith("suppress") and broad:
            yield f"suppresses everything in line {node.lineno}"


def _is_empty(part: ast.stmt) -> bool:
    return isinstance(part, ast.Pass) or isinstance(getattr(part, "value", None), ast.Constant)


def nothing_sleeps_in_tests(file: File) -> Iterator[str]:
    """Tests wait for the event, or poll with a bound (`tests/waiting.py`)."""
    for node in file.walk(ast.Call) if file.path.startswith("tests/") else ():
        assert isinstance(node, ast.Call)
        if not ast.unparse(node.func).endswith("sleep") or not node.args:
            continue
        seconds = getattr(node.args[0], "value", 0)
        if isinstance(seconds, int | float) and seconds >= LONGEST_SLEEP_SECONDS:
            yield f"sleeps {seconds} s in line {node.lineno}"


def only_known_folders(file: File) -> Iterator[str]:
    top = PurePosixPath(file.path).parts[0]
    if "/" in file.path and top not in ROOT_FOLDERS:
        yield f"is in {top}/, which is none of the house's folders"


def no_machine_is_named(file: File) -> Iterator[str]:
    """No path of one machine, no address of a package registry."""
    for pattern in (MACHINE_PATH, REGISTRY):
        yield from (f"names {found[0]}" for found in pattern.finditer(file.text))


def settings_exist(file: File) -> Iterator[str]:
    """Whatever is called TOLLGATE_… is a setting (tests may name wrong ones on purpose)."""
    known = {variable for variable, _default, _meaning in settings.describe()}
    if not file.path.startswith("tests/"):
        yield from (f"names {name}" for name in set(SETTING.findall(file.text)) - known)


def scripts_open_with_their_contract(file: File) -> Iterator[str]:
    """A script's header names every key and argument it uses, its reply and its invariant."""
    if file.path.endswith(".lua"):
        lines = file.text.splitlines()
        end = next((n for n, line in enumerate(lines) if not line.startswith("--")), len(lines))
        header, body = "\n".join(lines[:end]), "\n".join(lines[end:])
        needed = LUA_HEADER | set(LUA_ARGUMENT.findall(body))
        yield from (f"has no {word} in its header" for word in needed if word not in header)


RULES: list[Rule] = [
    layers,
    contract_needs_little,
    proxy_has_no_rust,
    sans_io_files_know_no_socket,
    functions_are_short,
    files_are_short,
    names_say_something,
    modules_say_what_they_own,
    nothing_is_unfinished,
    only_entry_points_print,
    no_exception_is_swallowed,
    nothing_sleeps_in_tests,
    only_known_folders,
    no_machine_is_named,
    settings_exist,
    scripts_open_with_their_contract,
]


def tree() -> Iterator[File]:
    """Every text file of the project; what tools and runs leave behind is skipped."""
    for path in sorted(ROOT.rglob("*")):
        relative = path.relative_to(ROOT)
        foreign = any(map(left_behind, relative.parts[:-1]))
        text = path.suffix in TEXT_SUFFIXES or path.name in TEXT_NAMES
        if text and not foreign and path.is_file():
            yield File(relative.as_posix(), path.read_text("utf-8"))


def left_behind(folder: str) -> bool:
    """Whether tools or runs made the folder: hidden ones (but `.ci`), and some by name."""
    hidden = folder.startswith(".") and folder not in ROOT_FOLDERS
    return hidden or folder in NOT_OURS or folder.endswith(".egg-info")


@pytest.fixture(scope="module")
def files() -> list[File]:
    return list(tree())


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_tree_follows(rule: Rule, files: list[File]) -> None:
    complaints = [f"{file.path} {complaint}" for file in files for complaint in rule(file)]
    assert not complaints, "\n" + "\n".join(complaints)


def test_the_tree_is_seen(files: list[File]) -> None:
    paths = {file.path for file in files}
    assert {"accounting/contract/settings.py", "Makefile", "tests/test_tidy.py"} <= paths
    assert any(path.endswith(".lua") for path in paths)


def test_the_readme_lists_every_setting() -> None:
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("no README yet")
    rows = {line.split("`")[1] for line in readme.read_text().splitlines() if "| `TOLL" in line}
    assert rows == {variable for variable, _default, _meaning in settings.describe()}


BROKEN: list[tuple[Rule, str, str]] = [
    (layers, "proxy/a.py", "from accounting import ledger"),
    (layers, "proxy/a.py", "import accounting.contract, accounting.ledger"),
    (layers, "accounting/a.py", "import admin_api.app"),
    (layers, "accounting/contract/a.py", "from .. import ledger"),
    (layers, "accounting/contract/a.py", "from accounting import embedded"),
    (layers, "admin_api/a.py", "def f():\n    from proxy import worker"),
    (contract_needs_little, "accounting/contract/a.py", "import aiohttp"),
    (proxy_has_no_rust, "proxy/a.py", "import orjson"),
    (sans_io_files_know_no_socket, "proxy/sse.py", "from asyncio import Event"),
    (sans_io_files_know_no_socket, "proxy/http_answer.py", "import socket"),
    (functions_are_short, "proxy/a.py", "async def f():\n" + "    x = 1\n" * 60),
    (files_are_short, "proxy/a.py", "x = 1\n" * 351),
    (files_are_short, "tests/a.py", "x = 1\n" * 601),
    (names_say_something, "proxy/utils.py", ""),
    (names_say_something, "proxy/common/a.py", ""),
    (modules_say_what_they_own, "proxy/a.py", "x = 1"),
    (nothing_is_unfinished, "proxy/a.py", "# TO" + "DO: later"),
    (nothing_is_unfinished, "a.sql", "-- FIX" + "ME"),
    (only_entry_points_print, "proxy/a.py", "print('here')"),
    (no_exception_is_swallowed, "proxy/a.py", "try:\n    f()\nexcept ValueError:\n    pass"),
    (no_exception_is_swallowed, "proxy/a.py", "try:\n    f()\nexcept OSError:\n    ..."),
    (no_exception_is_swallowed, "proxy/a.py", "with contextlib.suppress(Exception): f()"),
    (nothing_sleeps_in_tests, "tests/test_a.py", "await asyncio.sleep(0.1)"),
    (nothing_sleeps_in_tests, "tests/test_a.py", "time.sleep(2)"),
    (only_known_folders, "scripts/a.py", ""),
    (no_machine_is_named, "README.md", "in /wo" + "rk/main"),
    (no_machine_is_named, "package-lock.json", "https://registry.npm" + "js.org/openai"),
    (settings_exist, "README.md", "set `TOLLGATE_" + "BOGUS`"),
    (scripts_open_with_their_contract, "a.lua", "-- a: reply\nreturn 1"),
    (scripts_open_with_their_contract, "a.lua", "-- reply Invariant\nreturn ARGV[1]"),
]

SOUND: list[tuple[Rule, str, str]] = [
    (layers, "proxy/a.py", "from accounting.contract import money\nfrom . import worker"),
    (layers, "admin_api/a.py", "import accounting.ledger"),
    (layers, "accounting/contract/a.py", "from .money import UCR"),
    (functions_are_short, "tests/a.py", "def f():\n" + "    x = 1\n" * 60),
    (sans_io_files_know_no_socket, "proxy/worker.py", "import asyncio"),
    (modules_say_what_they_own, "tests/__init__.py", ""),
    (only_entry_points_print, "proxy/__main__.py", "print('here')"),
    (no_exception_is_swallowed, "proxy/a.py", "try:\n    f()\nexcept OSError:\n    return"),
    (nothing_sleeps_in_tests, "tests/test_a.py", "await asyncio.sleep(0)"),
    (no_machine_is_named, "README.md", "GET /v1/models, see ../work/notes"),
    (scripts_open_with_their_contract, "a.lua", "-- KEYS[1] reply Invariant\nf(KEYS[1])"),
    (settings_exist, "README.md", "set `TOLLGATE_LISTEN` (all start with TOLLGATE_)"),
]


@pytest.mark.parametrize(("rule", "path", "text"), BROKEN)
def test_a_rule_complains_of_what_it_forbids(rule: Rule, path: str, text: str) -> None:
    assert list(rule(File(path, text)))


@pytest.mark.parametrize(("rule", "path", "text"), SOUND)
def test_a_rule_accepts_what_is_allowed(rule: Rule, path: str, text: str) -> None:
    assert not list(rule(File(path, text)))


def test_every_rule_is_shown_to_fail() -> None:
    assert {rule for rule, _path, _text in BROKEN} == set(RULES)
