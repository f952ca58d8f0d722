"""Rules of the house that linters do not know."""

import ast
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from graphlib import TopologicalSorter
from itertools import zip_longest
from pathlib import Path

import pytest

from tests.support.harness.sources import parsed

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "skep"
LINES_MAX = 600
"""A class lives in one file with what only it needs; functions fit a screen (ruff)."""
FUNCTION_LINES_MAX = 60
"""A function fits a screen."""
PARAMETERS_MAX = 7
"""More in a constructor says that a value object or a layer is missing."""
LOOP_LINES_MAX = 150
"""A loop waits and composes.  Decisions are in other modules (decision 173)."""
FIELDS_MAX = 12
"""More say that the class has parts that belong together."""
COMPOSITIONS = {"Dispatcher", "Manager", "Node", "WireGuardTunnels", "NetnsReconciler"}
"""Classes that grew with each part of the system that they compose."""
UNDOCUMENTED_MAX = 0.05
"""The share of public classes and functions without a docstring.  It only falls, to 0.05."""
SURPRISING = re.compile(
    r"\b(?:shield|run_to_end|thread_to_end|uncancel|cancel|cancelling|CancelledError)\b|\bsleep\(0\)"
    r"|\b(?:AT|CLONE|MNT|MS|NLM_F|O|PR|SO|SOCK|UMOUNT)_[A-Z_]{3,}\b"
)
"""Cancellation, order of tasks, and flags of the kernel, which a reader takes for accidents without a reason."""
REASON = re.compile(
    r"\b(because|since|so that|otherwise|instead|unless|in order to|must|would|could|avoid\w*|prevent\w*|ensur\w*"
    r"|guarantee\w*|why|reason|source)\b",
    re.IGNORECASE,
)
REASONS_PER_100_LINES = 2.0
"""Comments and docstrings with a reason, in 100 lines of functions and constants that may surprise."""
CALLS_TO_THE_END_MAX = 10
"""Calls in ``engine/`` that shield work from a cancellation.  The table of a life decides what it interrupts."""
MODULES_MAX = 15
"""Modules in a folder, which a reader takes in at one look (decision 174)."""
SMALL_LINES = 80
"""A file with fewer lines that only one other file imports is part of that file, unless it is in ``SEPARATE``."""
SEPARATE = {
    "skep/cli/stack/stack_stops.py": "its importer has no lines left",
    "skep/dataplane/failover/hook_guard.py": "a program of its own",
    "skep/engine/runtime/bind_flags.py": "its importer has no lines left",
    "skep/linux/without_links.py": "a program of its own",
    "skep/manager/allocator/loop.py": "a loop beside its pure state",
    "skep/manager/orchestrator/converged_slots.py": "a pure decision with a property that tests prove",
    "skep/manager/orchestrator/reaper/loop.py": "a loop beside its pure state",
    "skep/manager/scheduler/loop.py": "a loop beside its pure state",
    "skep/manager/routes/extensions/notifications.py": "the routes of one kind, as those of users",
    "skep/patches/python_3_11_2.py": "only an old Python imports it",
    "skep/playground/images/nginx.py": "a program of its own",
    "skep/stack/address_needs.py": "its importer has no lines left, and it is pure",
    "skep/stack/compose/bound_files.py": "its importer has no lines left",
}
"""Small files with one importer, and why they are separate.  Their number only falls."""
REPEATED_NAMES_MAX = 16
"""Names of public classes that two modules define.  The number only falls."""
PATCHES_PER_100_TESTS_MAX = 1.5
"""Attributes that tests replace, in 100 tests.  The number only falls: pass a parameter or a fake."""
PRIVATE_PER_100_TESTS_MAX = 0.9
"""Private names that tests reach for, in 100 tests.  The number only falls."""
PUBLIC_DESPITE_UNDERSCORE = {"_replace", "_asdict", "_fields", "_exit"}
"""Names that the standard library documents."""
GENERATED = ("_pb2.py", "_grpc.py")

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
    "top": "as cli: it shows ages",
}
"""Folders or modules below skep/ that may read the machine's clock, and why.  Others take `now` or a Clock."""

PRINTS = {"cli", "playground"}
VAGUE_NAMES = {
    *("utils", "util", "common", "misc", "helpers", "base"),
    *("passed", "shown", "offers", "parts", "texts", "writes", "unread", "grants", "repeats", "dirty"),
    *("situation", "turns", "sharing", "planes", "readable", "roots", "moments"),
}
"""The second and third line are names from which no reader guessed the contents."""


@pytest.fixture(scope="module", autouse=True)
def forgotten() -> Iterator[None]:
    """Free the syntax trees at the end.  Each later garbage collection of the process would scan them for seconds."""
    yield
    for cached in (modules, modules_of_tests, parsed):
        cached.cache_clear()


@cache
def modules() -> tuple[tuple[Path, ast.Module], ...]:
    """Every module that people wrote."""
    return tuple(
        (path, parsed(path)) for path in sorted(PACKAGE.rglob("*.py")) if not path.name.endswith(GENERATED)
    )


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


def test_trees_are_removed_by_descriptors_alone() -> None:
    """``shutil.rmtree`` recurses: a container that nests directories would end what removes them (decision 34).

    A command removes what its own user has.
    """
    recursive = {"rmtree", "removedirs", "fwalk"}
    daemons = [(path, tree) for path, tree in modules() if path.relative_to(PACKAGE).parts[0] != "cli"]
    found = [
        f"{path}:{call.lineno}"
        for path, tree in daemons
        for call, _, name in calls(tree)
        if name in recursive
    ]
    assert found == []


def test_only_the_clock_reads_the_clock() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno} {owner}.{name}()"
        for path, tree in modules()
        if part(path) not in READS_THE_CLOCK
        for call, owner, name in calls(tree)
        if (owner, name) in CLOCK
    ]
    assert found == []


def test_only_the_security_package_makes_certificates() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno} {owner}.{name}()"
        for path, tree in modules()
        if part(path) != "security"
        for call, owner, name in calls(tree)
        if name == "CertificateBuilder"
    ]
    assert found == []


def test_every_task_has_a_parent() -> None:
    """asyncio.create_task and ensure_future start tasks without a parent: use a TaskGroup."""
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


def test_loops_fit_into_a_head() -> None:
    lines = {str(path.relative_to(ROOT)): path for path, _ in modules() if path.name == "loop.py"}
    long = {name for name, path in lines.items() if len(path.read_text().splitlines()) > LOOP_LINES_MAX}
    assert long == set()


def test_compositions_have_few_fields() -> None:
    """``Node`` is the class of ``skep/node``, not the cluster's object."""
    found = {
        node.name: len(fields_of(node))
        for path, tree in modules()
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name in COMPOSITIONS and part(path) != "model"
    }
    assert found.keys() == COMPOSITIONS
    assert {name for name, count in found.items() if count > FIELDS_MAX} == set(), found


def test_a_node_is_composed_without_tests_for_missing_parts() -> None:
    """What a node with containers and one of plain processes differ in is in ``layers/task_runtimes.py``."""
    (tree,) = [tree for path, tree in modules() if path == PACKAGE / "node" / "node.py"]
    missing = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        and any(isinstance(one, ast.Constant) and one.value is None for one in node.comparators)
    ]
    later = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Lambda)]
    assert missing + later == []


def fields_of(node: ast.ClassDef) -> set[str]:
    """Names that a class declares or that its methods assign on ``self``."""
    declared = {
        item.target.id
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }
    assigned = {
        item.attr
        for item in ast.walk(node)
        if isinstance(item, ast.Attribute)
        and isinstance(item.ctx, ast.Store)
        and isinstance(item.value, ast.Name)
        and item.value.id == "self"
    }
    return declared | assigned


def test_every_module_says_what_it_is() -> None:
    silent = [
        str(path.relative_to(ROOT)) for path, tree in modules() if tree.body and not ast.get_docstring(tree)
    ]
    assert silent == []


def test_every_folder_is_a_package() -> None:
    """A folder without ``__init__.py`` is invisible to the import contracts and missing from a wheel."""
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert sorted(str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").exists()) == []


def test_no_file_is_at_the_root_by_accident() -> None:
    """A redirection to a number instead of a descriptor makes a file named ``1``."""
    names = {path.name for path in ROOT.iterdir() if path.is_file()}
    assert {name for name in names if "." not in name} == {"LICENSE", "Makefile"}


def test_no_folder_has_more_modules_than_a_reader_takes_in() -> None:
    files = (*PACKAGE.rglob("*.py"), *(ROOT / "sim").rglob("*.py"))
    folders = Counter(path.parent for path in files if path.name != "__init__.py")
    full = {str(folder.relative_to(ROOT)): count for folder, count in folders.items() if count > MODULES_MAX}
    assert full == {}


def test_small_modules_with_one_importer_are_part_of_it() -> None:
    names = {name_of(path): path for path, _ in modules()}
    importers: dict[str, set[str]] = {name: set() for name in names}
    for path in PACKAGE.rglob("*.py"):
        for name in imported(parsed(path)) & names.keys() - {name_of(path)}:
            importers[name].add(name_of(path))
    small = {
        str(path.relative_to(ROOT))
        for name, path in names.items()
        if path.name != "__init__.py"
        and len(importers[name]) == 1
        and len(path.read_text().splitlines()) < SMALL_LINES
    }
    assert small == SEPARATE.keys()


def name_of(path: Path) -> str:
    """Return the dotted name by which other modules import a file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(tree: ast.Module) -> set[str]:
    """Return the dotted names that a module imports, and of each module the names that it takes from there."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports inside functions count too, and a package is not an importer of its own modules."""
    names = {name_of(path): path for top in (PACKAGE, ROOT / "sim") for path in top.rglob("*.py")}
    graph = {
        name: {one for one in imported(parsed(path)) & names.keys() if not f"{name}.".startswith(f"{one}.")}
        for name, path in names.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_a_public_class_has_a_name_of_its_own() -> None:
    places: dict[str, list[str]] = {}
    for path, tree in modules():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    repeated = {name: paths for name, paths in places.items() if len(paths) > 1}
    assert len(repeated) <= REPEATED_NAMES_MAX, repeated


def test_no_module_has_a_name_that_says_nothing() -> None:
    files = (*(path for path, _ in modules()), *PACKAGE.rglob("*.js"))
    assert [str(path.relative_to(ROOT)) for path in files if path.stem in VAGUE_NAMES] == []


Function = ast.FunctionDef | ast.AsyncFunctionDef


def definitions(
    tree: ast.AST, owner: str = "", is_public: bool = True
) -> Iterator[tuple[Function | ast.ClassDef, str, bool]]:
    """(definition, the class that it is in, whether other modules may use it) of each class and function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function | ast.ClassDef):
            public = is_public and not node.name.startswith("_")
            yield node, owner, public
            is_class = isinstance(node, ast.ClassDef)
            yield from definitions(node, node.name if is_class else owner, public and is_class)
        else:
            yield from definitions(node, owner, is_public)


def test_functions_fit_a_screen() -> None:
    longest = sorted(
        (
            (node.end_lineno - node.lineno + 1, f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
            for path, tree in modules()
            for node, _, _ in definitions(tree)
            if isinstance(node, Function) and node.end_lineno is not None
        ),
        reverse=True,
    )
    assert longest[0][0] <= FUNCTION_LINES_MAX, longest[:10]


def test_constructors_take_a_handful() -> None:
    larger = sorted(
        (
            (count, f"{path.relative_to(ROOT)}:{node.lineno} {owner}")
            for path, tree in modules()
            for node, owner, _ in definitions(tree)
            if isinstance(node, Function) and node.name == "__init__"
            if (count := len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs) - 1)
            > PARAMETERS_MAX
        ),
        reverse=True,
    )
    assert larger == []


def test_what_others_use_is_documented() -> None:
    public = [
        (f"{path.relative_to(ROOT)}:{node.lineno} {owner}.{node.name}", ast.get_docstring(node))
        for path, tree in modules()
        for node, owner, is_public in definitions(tree)
        if is_public
    ]
    undocumented = [name for name, text in public if not text]
    assert len(undocumented) <= UNDOCUMENTED_MAX * len(public), undocumented


def test_constants_have_a_reason_or_a_source() -> None:
    wordless = [
        (f"{path.relative_to(ROOT)}:{node.lineno}", name)
        for path, tree in modules()
        for node, name in wordless_constants(path.read_text().splitlines(), tree)
    ]
    assert wordless == []


def wordless_constants(lines: Sequence[str], tree: ast.Module) -> Iterator[tuple[ast.stmt, str]]:
    """Yield numbers of a module that have neither a docstring nor a comment.

    A comment above adjacent numbers of a protocol, such as flags of the kernel, is the comment of all of them.
    """
    commented_until = 0
    for node, following in zip_longest(tree.body, tree.body[1:]):
        end = node.end_lineno or node.lineno
        has_comment = lines[node.lineno - 2].startswith("#") or node.lineno - 1 == commented_until
        if has_comment:
            commented_until = end
        match node:
            case (
                ast.Assign(targets=[target], value=value)
                | ast.AnnAssign(target=target, value=ast.expr() as value)
            ):
                name = ast.unparse(target)
                has_words = isinstance(following, ast.Expr) or "#" in lines[end - 1] or has_comment
                if name.upper() == name and is_number(value) and not has_words:
                    yield node, name


def test_what_surprises_has_a_reason() -> None:
    lines = reasons = 0
    for path, tree in modules():
        text = path.read_text().splitlines()
        for first, last in surprising(text, tree):
            region = text[first - 1 : last]
            lines += sum(bool(line.strip()) for line in region)
            reasons += len(with_reasons(region))
    assert 100 * reasons / lines >= REASONS_PER_100_LINES, f"{reasons} in {lines}"


def surprising(lines: Sequence[str], tree: ast.Module) -> Iterator[tuple[int, int]]:
    """Yield the first and last line of functions that may surprise, and of numbers of a module with their words."""
    for node, _, _ in definitions(tree):
        if isinstance(node, Function) and SURPRISING.search(
            "\n".join(lines[node.lineno - 1 : node.end_lineno])
        ):
            yield node.lineno, node.end_lineno or node.lineno
    for node, following in zip_longest(tree.body, tree.body[1:]):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and is_number(node.value):
            has_words = isinstance(following, ast.Expr) and following.end_lineno is not None
            yield node.lineno, (following.end_lineno if has_words else node.end_lineno) or node.lineno


def with_reasons(lines: Sequence[str]) -> Sequence[str]:
    """Return the comments and docstrings with a word that introduces a reason."""
    comments = [line.partition("# ")[2] for line in lines if "# " in line]
    docstrings = re.findall(r'"""(.*?)"""', "\n".join(lines), re.DOTALL)
    return [text for text in (*comments, *docstrings) if REASON.search(text)]


def test_the_engine_shields_little_from_cancellations() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path, tree in modules()
        if part(path) == "engine"
        for call, _, name in calls(tree)
        if name in {"shield", "run_to_end", "carry_out"}
    ]
    assert len(found) <= CALLS_TO_THE_END_MAX, found


def is_number(value: ast.expr) -> bool:
    match value:
        case ast.Constant(value=int() | float()):
            return not isinstance(value.value, bool)
        case ast.UnaryOp(operand=operand):
            return is_number(operand)
        case ast.BinOp(left=left, right=right):
            return is_number(left) or is_number(right)
        case ast.Tuple(elts=elements):
            return bool(elements) and all(map(is_number, elements))
    return False


@cache
def modules_of_tests() -> tuple[tuple[Path, ast.Module], ...]:
    """Return every module of the tests."""
    return tuple((path, parsed(path)) for path in sorted((ROOT / "tests").rglob("*.py")))


def per_100_tests(places: Sequence[str]) -> float:
    """Return how many there are in 100 tests."""
    tests = sum(
        isinstance(node, Function) and node.name.startswith("test")
        for _, tree in modules_of_tests()
        for node in ast.walk(tree)
    )
    return 100 * len(places) / tests


def test_tests_replace_few_attributes() -> None:
    patches = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path, tree in modules_of_tests()
        for call, owner, name in calls(tree)
        if (name == "setattr" and owner) or (owner, name) == ("patch", "object")
    ]
    assert per_100_tests(patches) <= PATCHES_PER_100_TESTS_MAX, patches


def test_tests_use_public_names() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}"
        for path, tree in modules_of_tests()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and is_private_elsewhere(node)
    ]
    assert per_100_tests(found) <= PRIVATE_PER_100_TESTS_MAX, found


def is_private_elsewhere(node: ast.Attribute) -> bool:
    """Return whether the attribute is a private one of something other than the test's own object."""
    if not node.attr.startswith("_") or node.attr.startswith("__") or node.attr in PUBLIC_DESPITE_UNDERSCORE:
        return False
    return ast.unparse(node.value) not in {"self", "cls", "super()"}
