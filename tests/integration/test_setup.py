"""Set-up: quick the second time, and clear about what is missing."""

import os
import platform
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    """A world-readable copy of the set-up scripts."""
    for directory in (tmp_path, *tmp_path.parents):
        if directory.is_relative_to("/tmp") and directory != Path("/tmp"):
            directory.chmod(0o755)
    shutil.copytree(ROOT / "setup", tmp_path / "setup")
    return tmp_path / "setup"


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )


def a_path_without(directory: Path, *hidden: str) -> str:
    """A directory for $PATH with every command of the machine but ``hidden``."""
    directory.mkdir()
    for folder in ("/usr/bin", "/bin", "/usr/sbin", "/sbin"):
        for name in os.listdir(folder):
            link = directory / name
            if not any(name.startswith(word) for word in hidden) and not link.is_symlink():
                link.symlink_to(Path(folder) / name)
    return str(directory)


def test_the_second_time_is_quick_and_silent() -> None:
    run("make", "-C", ROOT, "--no-print-directory", "setup")
    started = time.monotonic()
    again = run("make", "-C", ROOT, "--no-print-directory", "setup")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert time.monotonic() - started < 5


def test_the_demo_needs_no_compiler_browser_haproxy_or_sshd() -> None:
    """Those are set up for the tests (``dev``).  ``make bare`` runs the demo on machines without them."""
    dry = run("make", "-C", ROOT, "--no-print-directory", "--dry-run", "demo").stdout
    assert "setup/setup.sh run\n" in dry
    assert "setup.sh dev" not in dry
    rows = [line.split("|") for line in (ROOT / "setup/packages.txt").read_text().splitlines() if "|" in line]
    needed = {words[0].strip() for words in rows if len(words) == 3 and not words[0].startswith("#")}
    assert {"runc", "conmon", "nft", "ip"} <= needed
    others = {"haproxy", "sshd", "prometheus", "docker-registry", "debootstrap", "curl", "gpg", "openssl"}
    assert needed & others == set()
    assert not any(word in name for name in needed for word in ("gcc", "cc1", "make", "chromium", "browser"))


def test_the_etcd_that_was_placed_is_new_enough() -> None:
    binary = Path(sys.prefix) / "libexec" / "skep" / "etcd"
    version = re.search(r"etcd Version: (\d+)\.(\d+)\.(\d+)", run(binary, "--version").stdout)
    assert version is not None
    assert tuple(map(int, version.groups())) >= (3, 5, 16)
    for tool in ("etcdctl", "etcdutl"):
        assert os.access(binary.with_name(tool), os.X_OK)


def test_the_plug_ins_that_were_placed_run_or_the_reason_is_kept() -> None:
    directory = Path(sys.prefix) / "libexec" / "skep"
    if (directory / "plugins-missing").exists():
        assert (directory / "plugins-missing").read_text().strip()
        return
    if platform.freedesktop_os_release()["ID"] == "debian":
        assert run(directory / "newest/docker", "--version").stdout.startswith("Docker version ")
    assert " 0." in run(directory / "docker-buildx", "version").stdout
    assert run(directory / "docker-compose", "version", "--short").stdout.startswith("2.")


def test_without_plug_ins_the_machine_is_set_up_and_the_reason_is_said_once(
    scripts: Path, tmp_path: Path
) -> None:
    path = a_path_without(tmp_path / "path", "apt")
    first = run(scripts / "plugins.sh", tmp_path / "libexec", PATH=path)
    assert (first.returncode, "there is no apt-get" in first.stderr) == (0, True), first.stderr
    assert "there is no apt-get" in (tmp_path / "libexec" / "plugins-missing").read_text()
    again = run(scripts / "plugins.sh", tmp_path / "libexec", PATH=path)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")


def test_without_a_browser_the_machine_is_set_up_and_the_reason_is_said_once(
    scripts: Path, tmp_path: Path
) -> None:
    path = a_path_without(tmp_path / "path", "apt", "chromium")
    first = run(scripts / "browser.sh", tmp_path / "libexec", PATH=path)
    assert (first.returncode, "there is no apt-get" in first.stderr) == (0, True), first.stderr
    assert "there is no apt-get" in (tmp_path / "libexec" / "browser-missing").read_text()
    again = run(scripts / "browser.sh", tmp_path / "libexec", PATH=path)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")


def test_root_tries_what_a_user_was_advised_to_do_as_root(scripts: Path, tmp_path: Path) -> None:
    path, folder = a_path_without(tmp_path / "path", "apt", "chromium"), tmp_path / "libexec"
    folder.mkdir()
    (folder / "browser-missing").write_text("only root can install it (sudo make setup)\n")
    assert run(*NOBODY, scripts / "browser.sh", folder, PATH=path).stderr == ""
    assert "there is no apt-get" in run(scripts / "browser.sh", folder, PATH=path).stderr


@pytest.fixture
def without_etcd(tmp_path: Path) -> str:
    """A $PATH on which the distribution's own suite has no etcd."""
    path = Path(a_path_without(tmp_path / "path", "apt-cache"))
    (path / "apt-cache").write_text("#!/bin/sh\n")
    (path / "apt-cache").chmod(0o755)
    return str(path)


@pytest.mark.slow
def test_an_etcd_of_a_newer_suite_is_fetched_in_seconds(tmp_path: Path, without_etcd: str) -> None:
    started = time.monotonic()
    done = run(ROOT / "setup" / "etcd.sh", tmp_path / "libexec", PATH=without_etcd)
    assert done.returncode == 0, done.stderr
    assert "fetching etcd from the suite" in done.stdout + done.stderr
    assert time.monotonic() - started < 45
    assert "etcd Version: 3." in run(tmp_path / "libexec" / "etcd", "--version").stdout


@pytest.mark.slow
def test_an_archive_signed_by_another_key_is_refused(
    scripts: Path, tmp_path: Path, without_etcd: str
) -> None:
    """With a keyring that has none of the archive's keys, nothing is placed."""
    suites = scripts / "etcd-suites.txt"
    suites.write_text(
        re.sub(r"\S+-archive-keyring\.gpg", "../../.." + str(tmp_path / "empty.gpg"), suites.read_text())
    )
    (tmp_path / "empty.gpg").touch()
    done = run(scripts / "etcd.sh", tmp_path / "libexec", PATH=without_etcd)
    assert done.returncode != 0
    assert "not signed" in done.stderr, done.stderr
    assert "no suite of" in done.stderr
    assert not (tmp_path / "libexec").exists()


def test_an_old_python_is_refused_with_what_to_do(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\necho Python 3.9.2\nexit 1\n")
    old.chmod(0o755)
    done = run(ROOT / "setup" / "setup.sh", "dev", PYTHON=str(old))
    assert done.returncode != 0
    assert "Python 3.11 or newer is needed; found: Python 3.9.2" in done.stderr
    assert "apt-get install python3" in done.stderr


def test_without_root_it_says_which_packages_to_install(scripts: Path, tmp_path: Path) -> None:
    with (scripts / "packages.txt").open("a") as file:
        file.write("no-such-command | no-such-package | install\n")
    done = run(*NOBODY, scripts / "packages.sh", "python3", tmp_path / "libexec")
    assert done.returncode != 0
    # Where the docker command is not on the path it is unpacked, and so missing here as well.
    assert re.search(r"missing: (\S+ )*no-such-command\b", done.stderr)
    assert re.search(r"sudo apt-get install (\S+ )*no-such-package\b", done.stderr)


def test_without_apt_it_says_what_is_missing(scripts: Path, tmp_path: Path) -> None:
    path = a_path_without(tmp_path / "path", "apt")
    with (scripts / "packages.txt").open("a") as file:
        file.write("no-such-command | no-such-package | install\n")
    done = run(scripts / "packages.sh", "python3", tmp_path / "libexec", PATH=path)
    assert done.returncode != 0
    assert "there is no apt-get here" in done.stderr


def test_without_the_venv_module_its_package_is_named(scripts: Path, tmp_path: Path) -> None:
    python = tmp_path / "python3"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    done = run(*NOBODY, scripts / "packages.sh", python, tmp_path / "libexec")
    assert "missing: module:ensurepip" in done.stderr
    assert "apt-get install python3-venv" in done.stderr


def test_every_locked_package_has_hashes_and_no_index_is_named() -> None:
    for name in ("requirements.lock", "requirements-dev.lock"):
        text = (ROOT / "setup" / name).read_text()
        assert "://" not in text
        assert "--index" not in text
        entries = re.split(r"\n(?=[a-z])", text)
        assert [entry.split("\n")[0] for entry in entries if "--hash=sha256:" not in entry] == []


def test_the_lock_has_every_dependency_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    node = [*project["dependencies"], *extras["server"]]
    for name, wanted in (
        ("requirements.lock", node),
        ("requirements-dev.lock", [*node, *extras["dev"]]),
    ):
        locked = set(re.findall(r"^([a-z0-9-]+)==", (ROOT / "setup" / name).read_text(), re.MULTILINE))
        names = {re.split(r"[<>=!~ \[]", requirement)[0].lower() for requirement in wanted}
        assert names - locked == set()
