"""What ``make package`` puts into the Debian package, without what it fetches."""

import gzip
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from skep.cli.maintain.upgrade_command import version_of

ROOT = Path(__file__).parents[2]
VERSION = "7.8.9rc1"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    done = subprocess.run(
        [ROOT / "setup/package.sh", "--own", folder, VERSION],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def control(tree: Path) -> dict[str, str]:
    fields = (line.partition(": ") for line in (tree / "DEBIAN/control").read_text().splitlines())
    return {name: value for name, _, value in fields}


def test_it_has_daemon_unit_completions_manual_and_settings(tree: Path) -> None:
    shipped = {str(path.relative_to(tree)) for path in tree.rglob("*") if not path.is_dir()}
    wanted = {
        "etc/skep/skep.toml",
        "usr/bin/skep",
        "usr/lib/skep/bin/python",
        "usr/lib/skep/bin/skep",
        "usr/lib/skep/lib/shared/skep/daemon.py",
        "usr/lib/skep/lib/shared/skep/wire/messages.binpb",
        "usr/lib/skep/libexec/skep/end-containers",
        "usr/lib/systemd/system/skep.service",
        "usr/share/bash-completion/completions/skep",
        "usr/share/doc/skep/changelog.gz",
        "usr/share/doc/skep/copyright",
        "usr/share/fish/vendor_completions.d/skep.fish",
        "usr/share/man/man1/skep.1.gz",
        "usr/share/skep/prometheus.yml",
        "usr/share/skep/skep-alerts.yml",
        "usr/share/skep/skep.cil",
        "usr/share/skep/skep.json",
        "usr/share/zsh/vendor-completions/_skep",
    }
    assert wanted - shipped == set()
    assert [
        path for path in shipped if "__pycache__" in path or path.startswith(("usr/local", "tests"))
    ] == []
    assert (tree / "DEBIAN/conffiles").read_text() == "/etc/skep/skep.toml\n"


def test_the_unit_starts_the_packages_command(tree: Path) -> None:
    unit = (tree / "usr/lib/systemd/system/skep.service").read_text()
    assert "\nExecStart=/usr/bin/skep daemon\n" in unit
    assert "/usr/local" not in unit


def test_the_completions_are_of_the_command(tree: Path) -> None:
    for path in ("bash-completion/completions/skep", "fish/vendor_completions.d/skep.fish"):
        assert "_SKEP_COMPLETE" in (tree / "usr/share" / path).read_text()


def test_its_settings_are_comments_that_hold_as_settings(tree: Path) -> None:
    text = (tree / "etc/skep/skep.toml").read_text()
    assert tomllib.loads(text) == {}
    examples = "".join(line[2:] for line in text.splitlines(keepends=True) if re.match("# [a-z-]+ = ", line))
    assert set(tomllib.loads(examples)) == {"advertise-addr", "labels"}


def test_its_version_sorts_before_the_release_and_the_code_has_it_too(tree: Path) -> None:
    assert control(tree)["Version"] == "7.8.9~rc1"
    compared = ["dpkg", "--compare-versions", control(tree)["Version"], "lt", "7.8.9"]
    assert subprocess.run(compared, check=False).returncode == 0
    assert f'__version__ = "{VERSION}"\n' in (tree / "usr/lib/skep/lib/shared/skep/__init__.py").read_text()


def test_a_release_has_its_date_in_the_changelog(tmp_path: Path) -> None:
    version = re.search(r"^## (\S+) \(", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert version is not None
    subprocess.run([ROOT / "setup/package.sh", "--own", tmp_path, version[1]], check=True, timeout=50)
    changelog = gzip.decompress((tmp_path / "usr/share/doc/skep/changelog.gz").read_bytes()).decode()
    assert re.search(rf"^## {version[1]} \(20\d\d-\d\d-\d\d\)$", changelog, re.MULTILINE)


@pytest.mark.parametrize(
    ("given", "code", "debian"),
    [("7.1.0-rc2", "7.1.0rc2", "7.1.0~rc2"), ("7.1.0+4.g1a2b3c4", "7.1.0+4.g1a2b3c4", "7.1.0+4.g1a2b3c4")],
)
def test_nodes_show_the_version_that_an_upgrade_reads_from_the_package(
    tmp_path: Path, given: str, code: str, debian: str
) -> None:
    package = [ROOT / "setup/package.sh", "--own", tmp_path, given]
    subprocess.run(package, check=True, capture_output=True, timeout=50)
    assert control(tmp_path)["Version"] == debian
    assert version_of(debian) == code
    shipped = tmp_path / "usr/lib/skep/lib/shared/skep/__init__.py"
    assert f'__version__ = "{code}"\n' in shipped.read_text()


def test_it_depends_on_the_programs_that_a_node_runs_and_on_a_python_it_has_libraries_for(tree: Path) -> None:
    names = {re.split("[ ,|]", one.strip())[0] for one in control(tree)["Depends"].split(",")}
    assert {"runc", "conmon", "nftables", "iproute2", "mount", "procps", "tini"} <= names
    assert control(tree)["Recommends"].startswith("crun,"), "the default where it can be used (decision 185)"
    pythons = sorted(path.name for path in (tree / "usr/lib/skep/lib").glob("python3.*"))
    lowest, highest = (int(name.partition(".")[2]) for name in (pythons[0], pythons[-1]))
    assert f"python3 (>= 3.{lowest}), python3 (<< 3.{highest + 1})" in control(tree)["Depends"]


def test_its_version_is_the_tags(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    git = ["git", "-C", str(clone), "-c", "user.name=a", "-c", "user.email=a@example.invalid"]
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    (clone / ".venv").symlink_to(sys.prefix)
    for number, (words, expected) in enumerate(
        [
            (("tag", "v7.0.1"), r"7\.0\.1"),
            (("commit", "-q", "--allow-empty", "-m", "later"), r"7\.0\.1\+1\.g[0-9a-f]+"),
        ]
    ):
        subprocess.run([*git, *words], check=True)
        tree = tmp_path / f"tree{number}"
        subprocess.run([clone / "setup/package.sh", "--own", tree], check=True, timeout=50)
        assert re.fullmatch(expected, control(tree)["Version"])
