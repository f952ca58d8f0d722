"""What can be checked of the documents without running them: links, paths, targets of make, how the README begins."""

import re
import subprocess
import tomllib
from functools import cache
from importlib import import_module
from itertools import chain
from pathlib import Path

import pytest

from skep.api.http.versions import NEWEST
from skep.configuration.sources import Arguments, combine
from tests.support.harness.documents import (
    PAGES,
    ROOT,
    fragments,
    headings,
    links,
    make_targets,
    quoted,
    shell_blocks,
)
from tests.support.harness.promises import exists
from tests.support.machines.docker_engines import VERSIONS

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def test_the_readme_begins_with_the_picture_and_the_two_commands() -> None:
    """Newcomers and the continuous integration call them.  Other tests run the first block of each section."""
    before, _, after = (ROOT / "README.md").read_text().partition("```sh\n")
    assert len(before.splitlines()) < 25
    assert "(docs/recording.svg)" in before
    block, _, _ = after.partition("```")
    assert [line.partition("#")[0].strip() for line in block.splitlines()] == ["make demo", "make test"]


@pages
def test_every_link_leads_somewhere(page: Path) -> None:
    assert [target for target in links(page) if not is_there(page.parent / target)] == []


@pages
def test_every_heading_that_a_link_names_exists(page: Path) -> None:
    missing = [(str(other), heading) for other, heading in fragments(page) if heading not in headings(other)]
    assert missing == []


WRAPPED = re.compile(
    r"docs/(design|checklists|guide|tutorials|cookbook|concepts|compare)/|[^/]+$|docs/[^/]+$"
)
COLUMNS_MAX = 120


@pages
def test_lines_are_wrapped_outside_of_tables_and_code(page: Path) -> None:
    if not WRAPPED.match(str(page.relative_to(ROOT))):
        return
    text = re.sub(r"```.*?```", lambda block: "\n" * block[0].count("\n"), page.read_text(), flags=re.DOTALL)
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if len(line) > COLUMNS_MAX]
    assert [one for one in lines if not one[1].lstrip().startswith(("|", "<", "!["))] == []


def is_there(path: Path) -> bool:
    """A file, or a folder with more than what Python leaves in a folder that has moved."""
    return path.is_file() or (path.is_dir() and any(entry.name != "__pycache__" for entry in path.iterdir()))


def test_the_index_leads_to_every_page() -> None:
    """To those of decisions and checklists by their folders."""
    index = ROOT / "docs" / "README.md"
    reached = {(index.parent / target).resolve() for target in links(index)}
    apart = {"decisions", "checklists"}
    expected = {page for page in PAGES if page.is_relative_to(index.parent) and not apart & set(page.parts)}
    assert sorted(str(page) for page in expected - {index} - reached) == []
    assert {index.parent / folder for folder in apart} <= reached


def test_the_index_of_decisions_has_every_record_once_with_its_title() -> None:
    folder = ROOT / "docs" / "decisions"
    index = re.findall(r"^\* \[(.+)\]\((.+)\)", (folder / "README.md").read_text(), re.MULTILINE)
    records = [
        (record.read_text().partition("\n")[0].removeprefix("# "), record.name)
        for record in sorted(folder.glob("[0-9]*.md"))
    ]
    assert sorted(index, key=lambda entry: entry[1]) == records


def test_every_record_has_a_number_of_its_own_and_a_name_from_its_title() -> None:
    """The words of the name are words of the title, in its order: ``0003-task-states.md`` is "3. Task states: ..."."""
    records = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
    numbers = [int(record.name[:4]) for record in records]
    assert sorted(set(numbers)) == numbers
    titles = {record.name: record.read_text().partition("\n")[0] for record in records}
    assert [name for name, title in titles.items() if not is_named_after(title, name)] == []


def is_named_after(title: str, name: str) -> bool:
    number, *words = name.removesuffix(".md").split("-")
    rest = iter(re.findall(r"[a-z0-9]+", title.lower().replace(",000", "000")))
    return title.startswith(f"# {int(number)}. ") and all(word in rest for word in words)


@pages
def test_every_target_of_make_that_is_named_exists(page: Path) -> None:
    words = [
        *quoted(page),
        *(line for block in shell_blocks(str(page.relative_to(ROOT))) for line in block.splitlines()),
    ]
    named = {match[1] for word in words if (match := re.match(r"make ([a-z-]+)", word))}
    assert named - make_targets() == set()


@pages
def test_the_files_that_a_recipe_shows_are_those_of_its_folder(page: Path) -> None:
    if page.parent.name != "cookbook":
        return
    text = page.read_text()
    files = {path.read_text() for path in page.with_suffix("").rglob("*") if path.is_file()}
    shown = re.findall(r"^```(?!sh$|text$)\w+\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert (page.with_suffix("") / "compose.yaml").read_text() in shown
    assert [block for block in shown if block not in files] == []


@pages
def test_every_block_of_settings_is_a_configuration(page: Path, tmp_path: Path) -> None:
    for name in ("acme-dns", "ca.pem", "server.pem", "server-key.pem"):
        (tmp_path / name).touch()
    for block in re.findall(r"```toml\n(.*?)```", page.read_text(), re.DOTALL):
        combine(Arguments(), tomllib.loads(block.replace("/etc/skep", str(tmp_path))), {})


@pages
def test_every_file_of_the_code_that_is_named_exists(page: Path) -> None:
    """Paths are written from the root, from ``skep`` or from one of its folders; results may be still to come."""
    rooms = ("manager", "node", "agent", "engine", "dataplane")
    roots = (ROOT, ROOT / "skep", *(ROOT / "skep" / room for room in rooms), page.parent)
    paths = [
        word for word in quoted(page) if re.fullmatch(r"[a-z_]+(/[a-z_0-9]+)+\.(py|sh|md|toml|txt)", word)
    ]
    assert [path for path in paths if not any((root / path).exists() for root in roots)] == []


@pages
def test_every_file_that_is_named_without_its_folder_exists(page: Path) -> None:
    """But for decision records, which say what was decided then."""
    names = {path.name for path in project_files()}
    named = {word for word in quoted(page) if re.fullmatch(r"[a-z_0-9]+\.(py|sh|proto)", word)}
    assert "decisions" in page.parts or named - names == set()


@pages
def test_every_class_and_function_that_is_named_exists(page: Path) -> None:
    """``CamelCase`` and ``snake_case`` words in backquotes; of dotted ones the last part; records as above.

    The table of renamed fields has names that no longer exist, and the one of Compose keys has keys of files.
    """
    form = r"(?:\w+\.)*(_?(?:[A-Z][a-z]+\w*|[a-z]+(?:_[a-z0-9]+)+))"
    named = {match[1] for word in quoted(page) if (match := re.fullmatch(form, word))}
    is_exempt = "decisions" in page.parts or page.name in ("renamed.md", "compatibility.md")
    assert is_exempt or named - identifiers() == set()


def test_every_name_of_the_map_is_defined_in_its_file() -> None:
    rows = re.findall(
        r"^\| .* \| \[.*\]\((.*\.py)\) \| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE
    )
    assert len(rows) >= 80
    missing = [
        (path, name)
        for path, names in rows
        for name in re.findall(r"`(\w+)`", names)
        if not re.search(
            rf"^(?:(?:async )?(?:def|class) {name}\b|{name} = )", (ROOT / path).read_text(), re.MULTILINE
        )
    ]
    assert missing == []


def test_the_picture_of_the_architecture_is_that_of_the_import_contracts() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["id"] == "layers"]
    page = (ROOT / "docs" / "architecture.md").read_text()
    (picture,) = re.findall(r"```text\n(daemon : .*?)```", page, re.DOTALL)
    drawn = [re.findall(r"\w+", re.split(r"\s{2,}", line)[0]) for line in picture.splitlines()]
    present = {path.stem for path in (ROOT / "skep").iterdir()}
    assert drawn == [[name for name in re.findall(r"\w+", row) if name in present] for row in layers]


def test_the_architecture_has_every_folder_of_the_package() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    folders = [path.parent for path in (ROOT / "skep").glob("*/__init__.py")]
    assert [folder.name for folder in folders if f"`skep/{folder.name}/" not in page] == []


@cache
def project_files() -> tuple[Path, ...]:
    folders = ("skep", "sim", "tests", "bench", "docs", "setup")
    return tuple(path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())


@cache
def identifiers() -> frozenset[str]:
    """All words of the project's sources."""
    sources = (path for path in project_files() if path.suffix in (".py", ".proto"))
    return frozenset(word for path in sources for word in re.findall(r"\w+", path.read_text()))


def test_the_continuous_integration_runs_the_readmes_test_command() -> None:
    assert re.search(r"^make .*\btest\b", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    tests = re.search(r"^test: (.*)\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert tests is not None
    assert tests[1].split("##")[0].split() == ["announce", "check"]
    assert "--whole -m 'not slow'" in tests[2]


def test_the_test_command_says_beforehand_what_it_runs_and_for_how_long() -> None:
    announced = subprocess.run(
        ["make", "--no-print-directory", "announce"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    ).stdout
    (minutes,) = re.findall(r"about (\d+) minutes", announced)
    assert f"about {minutes} minutes" in shell_blocks("README.md")[0]
    assert {"check", "unit"} <= make_targets() & set(re.findall(r"make (\w+)", announced))


@pytest.mark.parametrize("command", ["demo", "test"])
def test_both_commands_do_their_own_set_up(command: str) -> None:
    needs = dict(re.findall(r"^([a-z-]+): *([a-z- ]*)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    reached, waiting = set[str](), [command]
    while waiting:
        target = waiting.pop()
        reached.add(target)
        waiting += set(needs[target].split()) - reached
    assert reached & {"setup", "setup-run"}


def test_check_formats_lints_types_and_looks_at_imports() -> None:
    done = subprocess.run(
        ["make", "--dry-run", "check"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
    ).stdout
    for tool in ("ruff format --check .", "ruff check .", "mypy", "lint-imports"):
        assert f".venv/bin/{tool}\n" in done
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert project["mypy"]["strict"] is True
    assert project["importlinter"]["contracts"]


def test_every_test_that_the_page_of_swarmkits_scenarios_names_exists() -> None:
    page = ROOT / "docs" / "conformance" / "orchestration.md"
    named = re.findall(r"`(tests/[^`]+)`", page.read_text())
    assert len(named) > 60
    assert [name for name in named if not exists(name)] == []


def test_every_rule_for_files_in_dockerfiles_has_a_test_that_exists() -> None:
    page = ROOT / "docs" / "conformance" / "dockerfile-files.md"
    rows = [line.split("|") for line in page.read_text().splitlines() if line.startswith("| ")]
    rules = [cells for cells in rows if len(cells) == 5 and cells[1].strip() != "rule"]
    assert len(rules) > 60
    assert [cells[1] for cells in rules if "`tests/" not in cells[3]] == []
    named = re.findall(r"`(tests/[^`]+)`", page.read_text())
    assert [name for name in named if not exists(name)] == []


def test_every_change_of_the_api_has_a_test_that_exists_or_needs_none() -> None:
    page = ROOT / "docs" / "conformance" / "api-changes.md"
    text = page.read_text()
    versions = re.findall(r"^## (1\.\d+)$", text, re.M)
    assert versions == [f"1.{minor}" for minor in range(42, 42 + len(versions))]
    assert versions[-1] == str(NEWEST)
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ")]
    untested = [cells[1] for cells in rows if len(cells) != 5 or "`tests/" not in cells[3]]
    assert [line for line in untested if line.strip() != "entry"] == []
    named = re.findall(r"`(tests/[^`]+)`", text)
    assert [name for name in named if not exists(name)] == []


def test_the_page_of_compatibility_names_the_newest_version_and_the_tested_engines_and_its_evidence() -> None:
    text = (ROOT / "docs" / "reference" / "compatibility.md").read_text()
    versions = re.findall(r"^\| (?:1\.\d+ to )?(1\.\d+) \|", text, re.M)
    assert versions[-1] == str(NEWEST)
    engines = text[text.index("## Docker Engines as workers") : text.index("## Distributions")]
    assert re.findall(r"^\| (\d+\.\d+) \|", engines, re.M) == list(VERSIONS.values())
    assert [name for name in re.findall(r"`(tests/[^`]+)`", text) if not exists(name)] == []
    assert [name for name in re.findall(r"`(bench/[^`]+)`", text) if not (ROOT / name).exists()] == []


def test_every_situation_that_operators_met_has_a_test_that_exists() -> None:
    page = ROOT / "docs" / "conformance" / "operators.md"
    rows = [line.split("|") for line in page.read_text().splitlines() if line.startswith("| ")]
    found = [cells for cells in rows if cells[-2].strip() != "shown by"]
    assert [int(cells[1]) for cells in found if len(cells) == 5] == [*range(1, 35)]
    assert [cells[1] for cells in found if "`tests/" not in cells[-2]] == []
    named = re.findall(r"`(tests/[^`]+)`", page.read_text())
    assert [name for name in named if not exists(name)] == []


def test_every_item_of_the_talks_has_one_line_and_tests_that_exist() -> None:
    """Tests with parameters are named with a page that they run, or a script of the comparison with an engine."""
    page = ROOT / "docs" / "conformance" / "talks.md"
    lines = [line.split("|") for line in page.read_text().splitlines() if re.match(r"\| \d+ \|", line)]
    assert {len(cells) for cells in lines} == {6}
    assert [int(cells[1]) for cells in lines] == [*range(1, 158)]
    states = {"works": False, "works with a difference": True, "not yet": True, "nothing to build": None}
    for cells in lines:
        state, _, what = cells[3].strip().partition(": ")
        assert states[state] in (bool(what), None), f"{cells[1]}: a difference is said, and no other"
        assert "`tests/" in cells[4] or not state.startswith("works"), f"{cells[1]}: no test shows it"
    named = [name for cells in lines for name in re.findall(r"`([^`]+)`", cells[4])]
    for test, _, parameter in (name.removesuffix("]").partition("[") for name in named):
        assert re.fullmatch(r"tests/(\w+/)*test_\w+\.py::test_\w+", test), test
        assert exists(test), test
        assert not parameter or parameter in parameters(test), f"{test} does not run with {parameter}"


@cache
def parameters(test: str) -> frozenset[str]:
    """Return the texts with which a test is parametrized."""
    file, _, name = test.partition("::")
    module = import_module(file.removesuffix(".py").replace("/", "."))
    marks = getattr(getattr(module, name), "pytestmark", ())
    sets = [one for mark in marks if mark.name == "parametrize" for one in mark.args[1]]
    values = chain.from_iterable(getattr(one, "values", (one,)) for one in sets)
    return frozenset(value for value in values if isinstance(value, str))


def test_every_scenario_has_a_test_or_a_reason() -> None:
    page = ROOT / "docs" / "conformance" / "orchestration.md"
    rows = [line.split("|") for line in page.read_text().splitlines() if line.startswith("|")]
    shown_by = [cells[3].strip() for cells in rows if len(cells) == 5]
    assert [cell for cell in shown_by if "`tests/" not in cell and not cell.startswith("not ")] == [
        cell for cell in shown_by if cell in ("---", "our tests, and differences")
    ]
