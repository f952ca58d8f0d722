"""The Debian package on bare machines with their own systemd: installed, upgraded, downgraded, removed, purged.

Every suite's base system comes from its archive, and is kept (``setup/bootable.sh``).
"""

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from skep.cli.maintain import upgrade_means
from skep.playground.images.busybox import busybox_archive
from tests.support.machines.booted_machine import BootedMachine, a_booted_machine, build_package
from tests.support.machines.playground_rig import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.needs("root", "debootstrap", "dpkg-deb", "busybox"),
]

VERSIONS = ("1.0.0", "1.0.1")
SLEEP = ["sleep", "86399"]
INSTALL = "apt-get -q -y install --no-install-recommends --allow-downgrades"
OTHERS = " -o ".join(
    f"-path {path}"
    for path in (
        *("/proc", "/sys", "/dev", "/run", "/tmp"),
        *("/var/log", "/var/cache", "/var/lib/dpkg", "/var/lib/apt"),
    )
)
"""Where the distribution's own programs write in any case."""


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """This commit as two versions, the second packed from the first."""
    folder = tmp_path_factory.mktemp("packages")
    first = build_package(folder, VERSIONS[0])
    second = folder / first.name.replace(*VERSIONS)
    tree = folder / "tree"
    _run("dpkg-deb", "--raw-extract", first, tree)
    for path in (tree / "DEBIAN/control", tree / "usr/lib/skep/lib/shared/skep/__init__.py"):
        path.write_text(path.read_text().replace(VERSIONS[0], VERSIONS[1]))
    _run("dpkg-deb", "--root-owner-group", "-Zzstd", "-z1", "--build", tree, second)
    return [first, second]


@pytest.fixture(params=["bookworm", "trixie", "noble"])
def machine(request: pytest.FixtureRequest, packages: list[Path], tmp_path: Path) -> Iterator[BootedMachine]:
    with a_booted_machine(request.param, tmp_path, packages[0]) as made:
        for package, version in zip(packages, VERSIONS, strict=True):
            (made.directory / f"root/{version}.deb").write_bytes(package.read_bytes())
        yield made


def found_on(machine: BootedMachine) -> dict[str, set[str]]:
    """What a package may leave behind, by kind."""
    commands = {
        "files": f"find / \\( {OTHERS} \\) -prune -o -print",
        "run": "find /run -maxdepth 1 -name '*skep*'",
        "links": "ip -o link | cut -d ' ' -f 2",
        "tables": "nft list tables",
        "cgroups": "find /sys/fs/cgroup -name 'skep*'",
        "mounts": "awk '{ print $5 }' /proc/self/mountinfo",
        "units": "systemctl list-unit-files --no-legend --no-pager 'skep*' || true",
    }
    return {kind: set(machine.run(command).splitlines()) for kind, command in commands.items()}


def runs(machine: BootedMachine, version: str) -> bool:
    """Whether systemd holds the daemon for ready, and it is of this version."""
    if machine.run("systemctl is-active skep || true").strip() != "active":
        return False
    return bool(machine.client().version()["Version"] == version)


def with_a_service(machine: BootedMachine) -> int:
    """A cluster of one, a published service on an overlay network, and a plain container: the service's pid."""
    client = machine.client()
    client.images.load(asyncio.run(busybox_archive()).data)
    client.swarm.init(listen_addr="0.0.0.0:2377", advertise_addr="198.51.100.7")
    client.networks.create("inner", "overlay")
    ports: dict[str, Any] = {"Ports": [{"PublishedPort": 8080, "TargetPort": 80}]}
    client.services.create("busybox:1", command=SLEEP, name="web", networks=["inner"], endpoint_spec=ports)
    client.containers.run("busybox:1", ["sleep", "86398"], volumes=["data:/data"], detach=True)
    wait_until(lambda: len(machine.processes("^sleep 8639")) == 2, "both containers run", 60)
    return machine.processes("^" + " ".join(SLEEP))[0]


def test_the_package_is_installed_upgraded_removed_and_purged(machine: BootedMachine) -> None:
    first, second = VERSIONS
    before = found_on(machine)
    machine.run(f"{INSTALL} /root/{first}.deb")
    assert runs(machine, first)
    assert machine.run("skep --version").split()[-1] == first
    machine.run("systemd-analyze verify --man=no skep.service")
    machine.run(
        "test -s /usr/share/man/man1/skep.1.gz && test -s /usr/share/bash-completion/completions/skep"
    )
    assert machine.run("systemctl is-enabled skep").strip() == "enabled"
    pid = with_a_service(machine)

    machine.run("echo 'labels = [\"kept=yes\"]' >>/etc/skep/skep.toml")
    machine.run(upgrade_means.KEEP_FORMER)
    for package, version in (
        (f"/root/{second}.deb", second),
        (upgrade_means.FORMER, first),
        (f"/root/{second}.deb", second),
    ):
        machine.run(f"{INSTALL} {package}")
        wait_until(lambda version=version: runs(machine, version), f"{version} runs", 60)
        assert machine.client().info()["Labels"] == ["kept=yes"]
        assert machine.processes("^" + " ".join(SLEEP)) == [pid]
    service = machine.client().services.get("web")
    wait_until(lambda: [one["Status"]["State"] for one in service.tasks()] == ["running"], "web runs", 60)

    machine.run("apt-get -q -y remove skep")
    assert machine.processes("^sleep 8639|skep") == []
    machine.run("test -d /var/lib/skep/volumes/data && grep -q kept=yes /etc/skep/skep.toml")
    machine.run(f"{INSTALL} /root/{second}.deb")
    wait_until(lambda: machine.processes("^" + " ".join(SLEEP)), "the service starts again", 90)

    machine.run("apt-get -q -y purge skep")
    assert machine.processes("^sleep 8639|skep") == []
    left = {kind: sorted(found - before[kind]) for kind, found in found_on(machine).items()}
    assert {kind: found for kind, found in left.items() if found} == {}
