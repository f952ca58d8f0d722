"""A release: one place holds its version."""

import re
import subprocess
import tomllib
from importlib.metadata import version

from skep import __version__
from skep.api.http.server import SERVER
from tests.support.harness.documents import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_is_written_in_the_code_and_derived_elsewhere() -> None:
    assert "version" not in PROJECT["project"]
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "skep.__version__"}
    assert version("skep-orchestrator") == __version__
    assert f"Skep/{__version__} (linux)" == SERVER
    # Tests and docs/reference have examples of versions; each of the other files has its reason here.
    found = subprocess.run(
        [
            "git",
            "grep",
            "-l",
            "--fixed-strings",
            f'"{__version__}"',
            "--",
            "skep",
            "setup",
            "packaging",
            "*.toml",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout.split() == ["skep/__init__.py"]


def test_the_pages_and_the_man_page_follow_the_version() -> None:
    """``make reference`` writes the man page; the others are changed by hand with the version."""
    assert f'"skep {__version__}"' in (ROOT / "packaging/skep.1").read_text()
    newest = re.search(r"^## (\S+) \(", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == __version__
    assert f"Status: {__version__}" in (ROOT / "README.md").read_text()


def test_the_distribution_is_described_for_an_index() -> None:
    """But for addresses: there is no public one yet (decision 184)."""
    project = PROJECT["project"]
    assert project["name"] == "skep-orchestrator"
    assert project["authors"]
    assert {"readme", "license", "requires-python", "description", "keywords"} <= project.keys()
    assert all((ROOT / name).is_file() for name in project["license-files"])
    minors = {int(minor) for minor in re.findall(r"Python :: 3\.(\d+)", " ".join(project["classifiers"]))}
    (oldest,) = re.findall(r"^>=3\.(\d+)$", project["requires-python"])
    packaged = re.search(r'^pythons="(.*?)"', (ROOT / "setup/package.sh").read_text(), re.MULTILINE)
    assert packaged is not None
    assert minors == {int(one.partition(".")[2]) for one in packaged[1].split()}
    assert min(minors) == int(oldest)
    extras = project["optional-dependencies"]
    assert extras["client"] == []
    names = {re.split(r"[<>=!~ \[]", one)[0] for one in project["dependencies"]}
    assert names & {re.split(r"[<>=!~ \[]", one)[0] for one in extras["server"]} == set()
