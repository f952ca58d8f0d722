"""A release's folder and its install script, with small packages, on a temporary copy of this machine's file system.

The real packages are installed by ``make bare-release``.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.support.harness.documents import ROOT
from tests.support.machines.directories import a_directory

pytestmark = pytest.mark.needs("root", "dpkg-deb", "apt-get", "gpg", "gpgv")

VERSION = "9.8.7"
TARBALL = f"skep-{VERSION}-linux-x86_64"
EPOCH = "1790000000"
COMMAND = f"#!/bin/sh\necho skep, version {VERSION}\n"
KEY = "Releases <releases@skep.invalid>"


class Release:
    """The folder of a release, which a server on loopback serves at ``address``."""

    def __init__(self, folder: Path, gnupg: Path) -> None:
        self.folder, self.gnupg_home = folder, gnupg
        self.address = ""

    def publish(self, key: str = KEY) -> None:
        environment = {
            **os.environ,
            "GNUPGHOME": str(self.gnupg_home),
            "KEY": key,
            "SOURCE_DATE_EPOCH": EPOCH,
        }
        published(self.folder, environment)

    def digests(self) -> dict[str, str]:
        """Return the checksum of each file by its name in the folder."""
        return {
            str(path.relative_to(self.folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        }


def published(folder: Path, environment: dict[str, str], version: str = VERSION) -> None:
    done = subprocess.run(
        [ROOT / "setup/publish.sh", folder, version],
        env=environment,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def small_package(folder: Path, work: Path) -> None:
    (work / "DEBIAN").mkdir(parents=True)
    (work / "DEBIAN/control").write_text(
        f"Package: skep\nVersion: {VERSION}\nArchitecture: amd64\n"
        "Maintainer: Skep <skep@skep.invalid>\nDescription: small\n"
    )
    (work / "usr/bin").mkdir(parents=True)
    (work / "usr/bin/skep").write_text(COMMAND)
    (work / "usr/bin/skep").chmod(0o755)
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "--build", work, folder / f"skep_{VERSION}_amd64.deb"],
        env={**os.environ, "SOURCE_DATE_EPOCH": EPOCH},
        check=True,
        capture_output=True,
    )


def small_tarball(folder: Path, work: Path) -> None:
    for name, text in (
        ("bin/skep", COMMAND),
        ("bin/python3", "#!/bin/sh\n"),
        ("libexec/skep/end-containers", "#!/bin/sh\n"),
        ("share/doc/skep/bundled.txt", "runc 1.1.5+ds1-1 amd64\netcd 3.5.16\n"),
    ):
        path = work / TARBALL / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    subprocess.run(["tar", "-czf", folder / f"{TARBALL}.tar.gz", "-C", work, TARBALL], check=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    """A signed release, made once."""
    with a_directory("skep-gpg-") as gnupg:  # short: gpg's agent listens on a socket below
        gnupg.chmod(0o700)
        gpg = ["gpg", "--homedir", str(gnupg), "--batch", "--quiet", "--passphrase", ""]
        faked = ["--faked-system-time", "1780000000!"]
        subprocess.run([*gpg, *faked, "--quick-generate-key", KEY, "ed25519", "sign", "never"], check=True)
        folder = tmp_path_factory.mktemp("release")
        small_package(folder, tmp_path_factory.mktemp("work") / "package")
        small_tarball(folder, tmp_path_factory.mktemp("work"))
        release = Release(folder, gnupg)
        release.publish()
        try:
            yield release
        finally:
            subprocess.run(["gpgconf", "--homedir", gnupg, "--kill", "all"], check=False)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


@pytest.fixture
def release(made: Release, tmp_path: Path) -> Iterator[Release]:
    """A copy of it, served on loopback."""
    folder = tmp_path / "served"
    shutil.copytree(made.folder, folder)
    copy = Release(folder, made.gnupg_home)
    handler = partial(_Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        serving = Thread(target=server.serve_forever, args=(0.05,))
        serving.start()
        copy.address = f"http://127.0.0.1:{server.server_address[1]}"
        yield copy
        server.shutdown()
        serving.join()


class Machine:
    """This machine's root file system with changes in a directory of the test, so that the machine keeps its state."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        for name in ("upper", "work", "root"):
            (directory / name).mkdir()

    def run(self, command: str, *, stdin: str = "", user: str = "0") -> subprocess.CompletedProcess[str]:
        # needrestart, where it is installed, would look at every process of this machine.
        environment = "PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root NEEDRESTART_SUSPEND=1"
        inner = f"chroot --userspec={user} . env -i {environment} sh -c"
        return subprocess.run(
            [
                *("unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-euc"),
                f"""
                mount --make-rprivate /
                cd {self._directory}
                mount -t overlay overlay -o lowerdir=/,upperdir=upper,workdir=work root
                cd root
                mount -t proc proc proc
                mount --rbind /dev dev
                mount -t tmpfs tmpfs run
                mount -t tmpfs -o mode=1777 tmpfs tmp
                exec {inner} "$1"
                """,
                *("sh", command),
            ],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )

    def install(self, release: Release, *options: str, user: str = "0") -> subprocess.CompletedProcess[str]:
        script = (release.folder / "install.sh").read_text()
        words = " ".join(("--from", release.address, *options))
        return self.run(f"sh -s -- {words}", stdin=script, user=user)

    def changes(self) -> list[str]:
        """Return the files of Skep that were added, which an installation leaves."""
        upper = self._directory / "upper"
        places = ("opt", "usr/local/bin", "usr/bin", "etc/apt/sources.list.d", "usr/share/keyrings")
        return sorted(
            str(path.relative_to(upper))
            for place in places
            for path in (upper / place).rglob("*skep*")
            if not path.is_char_device()  # a deleted file of the machine
        )


@pytest.fixture
def machine() -> Iterator[Machine]:
    with a_directory("skep-machine-") as directory:
        yield Machine(directory)


def test_a_release_is_the_same_in_every_run(made: Release) -> None:
    before = made.digests()
    made.publish()
    assert made.digests() == before
    assert {
        "SHA256SUMS.asc",
        "apt/dists/stable/InRelease",
        "apt/dists/stable/main/binary-amd64/Packages.gz",
    } <= set(before)
    listed = dict(reversed(line.split()) for line in (made.folder / "SHA256SUMS").read_text().splitlines())
    apart = {"SHA256SUMS", "SHA256SUMS.asc"}
    assert listed == {name: sum for name, sum in before.items() if "/" not in name and name not in apart}


@pytest.mark.parametrize(
    ("script", "key", "epoch", "words"),
    [
        ("setup/publish.sh", KEY, "1770000000", "is younger than the commit, at whose time it would sign"),
        ("setup/publish.sh", "nobody", EPOCH, "gpg has no secret key nobody"),
        ("setup/release.sh", "nobody", EPOCH, "gpg has no secret key nobody"),
    ],
)
def test_a_key_that_cannot_sign_is_refused_before_anything_is_made(
    made: Release, tmp_path: Path, script: str, key: str, epoch: str, words: str
) -> None:
    environment = {
        **os.environ,
        "GNUPGHOME": str(made.gnupg_home),
        "KEY": key,
        "SOURCE_DATE_EPOCH": epoch,
    }
    target = [tmp_path] if "publish" in script else []
    done = subprocess.run(
        [ROOT / script, *target, VERSION],
        env=environment,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (done.returncode, words in done.stderr) == (1, True), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_notes_are_the_versions_section_of_the_changelog(made: Release, tmp_path: Path) -> None:
    """Of a version that the changelog does not have yet, the section that its fragments will become."""
    notes = (made.folder / "RELEASE-NOTES.md").read_text()
    assert notes.startswith(f"## {VERSION} (")
    assert re.findall(r"^## .*", notes, re.MULTILINE) == [notes.splitlines()[0]]
    shutil.copy(made.folder / f"skep_{VERSION}_amd64.deb", tmp_path)
    published(tmp_path, {**os.environ, "SOURCE_DATE_EPOCH": EPOCH, "KEY": ""}, "0.1.0")
    heading, *lines = (tmp_path / "RELEASE-NOTES.md").read_text().splitlines()
    assert heading == "## 0.1.0 (2026-09-21)"
    assert "### Added" in lines
    links = {target for line in lines for target in re.findall(r"\]\(([^)]+)\)", line)}
    assert links
    assert [link for link in links if not (ROOT / "docs" / source_of(link)).exists()] == []
    changelog = (ROOT / "CHANGELOG.md").read_text().splitlines()
    assert [line for line in lines if "](" not in line and line not in changelog] == []


def source_of(link: str) -> str:
    """Return the page of ``docs`` of a link to the release's site."""
    return link.removeprefix("site/").replace(".html", ".md")


def test_the_bill_of_materials_has_locked_packages_and_bundled_programs(made: Release) -> None:
    bill = json.loads((made.folder / f"skep-{VERSION}.cdx.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    found = {one["name"]: one["purl"] for one in bill["components"]}
    assert found["runc"] == "pkg:deb/debian/runc@1.1.5%2Bds1-1?arch=amd64"
    assert found["etcd"] == "pkg:github/etcd-io/etcd@v3.5.16"
    assert found["aiohttp"].startswith("pkg:pypi/aiohttp@")
    assert "setuptools" not in found


def test_the_tarball_is_installed_once_and_removed(release: Release, machine: Machine) -> None:
    first = machine.install(release, "--no-apt")
    assert first.returncode == 0, first.stderr
    assert f"skep, version {VERSION} is installed in /opt/skep" in first.stdout
    after = machine.changes()
    assert "usr/local/bin/skep" in after
    again = machine.install(release, "--no-apt")
    assert again.stdout.endswith(f"skep: {VERSION} is already installed in /opt/skep\n"), again.stderr
    assert machine.changes() == after
    removed = machine.install(release, "--uninstall")
    assert removed.returncode == 0, removed.stderr
    assert machine.changes() == []


def test_apt_installs_from_the_signed_repository(release: Release, machine: Machine) -> None:
    for _ in range(2):
        done = machine.install(release)
        assert done.returncode == 0, done.stderr
        assert f"skep: skep, version {VERSION} is installed by apt\n" in done.stdout
        assert re.search(
            r"^skep: to begin with this machine alone.* skep swarm init$", done.stdout, re.MULTILINE
        )
    assert machine.changes() == [
        "etc/apt/sources.list.d/skep.list",
        "usr/bin/skep",
        "usr/share/keyrings/skep-archive-keyring.gpg",
    ]
    assert machine.install(release, "--uninstall").returncode == 0
    assert machine.changes() == []


@pytest.mark.parametrize("page", ["docs/guide/start.md", "docs/guide/install.md"])
def test_the_first_commands_of_a_page_install_a_release(
    release: Release, machine: Machine, page: str
) -> None:
    """Without a checkout.  Other packages are only looked up: newer ones would be fetched."""
    block = re.search(r"```text\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert block is not None
    address = "https://skep.example.com/release-0.1.0"
    assert address in block[1]
    commands = (
        block[1].replace(address, release.address).replace("apt-get install", "apt-get install --simulate")
    )
    done = machine.run(f"cd /tmp && set -e && {commands}")
    assert done.returncode == 0, done.stderr
    assert f"skep: skep, version {VERSION} is installed by apt\n" in done.stdout


@pytest.mark.parametrize("options", [(), ("--no-apt",)])
@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ("SHA256SUMS", "the signature of {address} is wrong. Nothing was changed"),
        ("skep-archive-keyring.gpg", "the signature of {address} is wrong. Nothing was changed"),
    ],
)
def test_a_wrong_signature_changes_nothing(
    release: Release, machine: Machine, damaged: str, message: str, options: tuple[str, ...]
) -> None:
    path = release.folder / damaged
    path.write_bytes(path.read_bytes()[:-9] + b"damaged!\n")
    done = machine.install(release, *options)
    assert done.returncode == 1
    assert message.format(address=release.address) in done.stderr
    assert machine.changes() == []


@pytest.mark.parametrize(
    ("options", "name"), [((), f"apt/pool/skep_{VERSION}_amd64.deb"), (("--no-apt",), f"{TARBALL}.tar.gz")]
)
def test_a_wrong_checksum_installs_nothing(
    release: Release, machine: Machine, options: tuple[str, ...], name: str
) -> None:
    path = release.folder / name
    path.write_bytes(path.read_bytes()[:-9] + b"damaged!\n")
    done = machine.install(release, *options)
    assert done.returncode == 1
    assert "skep: " in done.stderr
    assert not any(path.endswith("bin/skep") for path in machine.changes())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--key", "0123456789ABCDEF0123456789ABCDEF01234567"),
            "is signed by another key than 0123456789ABCDEF",
        ),
        (("--no-apt", "--version", "1.2.3"), "has no skep-1.2.3-linux-x86_64.tar.gz. Nothing was changed"),
        (("--version", "1.2.3"), "has no package for amd64. Nothing was changed"),
        (("--sideways",), "--sideways is no option"),
    ],
)
def test_refusals_name_the_reason(
    release: Release, machine: Machine, options: tuple[str, ...], message: str
) -> None:
    done = machine.install(release, *options)
    assert done.returncode == 1
    assert message in done.stderr
    assert machine.changes() == []


def test_other_users_and_processors_are_refused(release: Release, machine: Machine) -> None:
    done = machine.install(release, "--no-apt", user="65534")
    assert (done.returncode, done.stderr) == (1, "skep: this needs root\n      run it with sudo\n")
    (release.folder / "install.sh").write_text(
        (release.folder / "install.sh")
        .read_text()
        .replace("set -eu\n", "set -eu\nuname() { [ $1 = -s ] && echo Linux || echo s390x; }\n", 1)
    )
    done = machine.install(release, "--no-apt")
    assert done.returncode == 1
    assert "the architecture s390x is not supported" in done.stderr
    assert machine.changes() == []


def test_a_system_without_the_gnu_c_library_is_refused(release: Release, machine: Machine) -> None:
    """As Alpine, where its loader is missing."""
    script = release.folder / "install.sh"
    loader = "/lib64/ld-linux-x86-64.so.2"
    assert loader in script.read_text()
    script.write_text(script.read_text().replace(loader, "/lib64/no-such-loader"))
    done = machine.install(release, "--no-apt")
    assert done.returncode == 1
    assert "this system has no GNU C library, which the tarball needs" in done.stderr
    assert machine.changes() == []


def test_an_unsigned_release_is_installed_only_on_request(release: Release, machine: Machine) -> None:
    release.publish(key="")
    assert not (release.folder / "SHA256SUMS.asc").exists()
    done = machine.install(release, "--no-apt")
    assert done.returncode == 1
    assert "cannot check the signature" in done.stderr
    for options in (("--no-apt",), ()):
        done = machine.install(release, "--allow-unsigned", *options)
        assert done.returncode == 0, done.stderr
