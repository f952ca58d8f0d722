"""Rules of the house that linters do not know."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "skep"
LINES_MAX = 600
"""A class lives in one file with what only it needs; functions fit a screen (ruff)."""
GENERATED = ("_pb2.py", "_pb2.pyi", "_grpc.py")

CLOCK = {
    ("time", "time"),
    ("time", "time_ns"),
    ("time", "monotonic"),
    ("time", "monotonic_ns"),
    ("datetime", "now"),
    ("datetime", "utcnow"),
}
READS_THE_CLOCK = {
    "aio": "the clock that everyone is given",
    "cli": "a command is an edge: what it shows is about now",
    "playground": "it waits for real processes",
}
"""Folders or modules below skep/ that may read the machine's clock, and why.  Others take `now` or a Clock."""

PRINTS = {"cli", "playground"}
VAGUE_NAMES = {"utils", "util", "common", "misc", "helpers", "base"}


def modules() -> Iterator[tuple[Path, ast.Module]]:
    """Every module that people wrote."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if not path.name.endswith(GENERATED):
            yield path, ast.parse(path.read_text(), str(path))


def calls(tree: ast.Module) -> Iterator[tuple[ast.Call, str, str]]:
    """(call, what stands before the last dot, name) of each call of a name or an attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            match node.func:
                case ast.Attribute(value=ast.Name(id=owner), attr=name):
                    yield node, owner, name
                case ast.Attribute(attr=name):
                    yield node, "?", name
                case ast.Name(id=name):
                    yield node, "", name


def part(path: Path) -> str:
    """The folder or module directly below skep/."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_only_the_clock_reads_the_clock() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno} {owner}.{name}()"
        for path, tree in modules()
        if part(path) not in READS_THE_CLOCK
        for call, owner, name in calls(tree)
        if (owner, name) in CLOCK
    ]
    assert found == []


def test_every_task_has_a_parent() -> None:
    """asyncio.create_task and ensure_future start what nobody waits for: use a TaskGroup."""
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path, tree in modules()
        for call, owner, name in calls(tree)
        if name == "ensure_future" or (name == "create_task" and owner in ("asyncio", "loop", ""))
    ]
    assert found == []


def test_nothing_leaves_an_except_star() -> None:
    """Python before 3.11.4 makes a group of every error, a cancellation too, that is raised there (gh-103590)."""
    found = [
        f"{path.relative_to(ROOT)}:{inside.lineno}"
        for path, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.TryStar)
        for handler in node.handlers
        for inside in ast.walk(handler)
        if isinstance(inside, ast.Raise | ast.Await | ast.AsyncFor | ast.AsyncWith)
    ]
    assert found == []


def test_no_line_of_the_log_hides_what_it_was_given() -> None:
    """Every line says time, level and process itself, over whatever a call has under those names."""
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno} {keyword.arg}"
        for path, tree in modules()
        for call, owner, _ in calls(tree)
        if owner == "log"
        for keyword in call.keywords
        if keyword.arg in {"process", "level", "timestamp", "event"}
    ]
    assert found == []


def test_only_commands_print() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path, tree in modules()
        if part(path) not in PRINTS
        for call, owner, name in calls(tree)
        if (owner, name) == ("", "print")
    ]
    assert found == []


def test_files_fit_into_a_head() -> None:
    written = (*ROOT.glob("skep/**/*.py"), *ROOT.glob("tests/**/*.py"))
    long = {
        str(path.relative_to(ROOT)): lines
        for path in written
        if not path.name.endswith(GENERATED) and (lines := len(path.read_text().splitlines())) > LINES_MAX
    }
    assert long == {}


def test_every_module_says_what_it_is() -> None:
    silent = [
        str(path.relative_to(ROOT)) for path, tree in modules() if tree.body and not ast.get_docstring(tree)
    ]
    assert silent == []


def test_every_folder_is_a_package() -> None:
    """A folder without ``__init__.py`` is invisible to the import contracts and missing from a wheel."""
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert sorted(str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").exists()) == []


def test_no_module_has_a_name_that_says_nothing() -> None:
    vague = [str(path.relative_to(ROOT)) for path, _ in modules() if path.stem in VAGUE_NAMES]
    assert vague == []
