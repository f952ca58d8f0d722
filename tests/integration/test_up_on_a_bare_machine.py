"""`skep up --package` by OpenSSH's client, to a bare machine's own sshd, systemd, apt and dpkg.

The client is another machine of its network, of which it has nothing but the network: it is the machine's gateway.
"""

import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clients.ssh_client import a_forwarded_socket, write_client
from tests.support.machines.booted_machine import BootedMachine, a_booted_machine, build_package
from tests.support.machines.playground_rig import CLIS, SKEP

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.needs("root", "debootstrap", "dpkg-deb", "ssh", "ssh-keygen"),
]

ADDRESS, GATEWAY = "198.51.100.7", "198.51.100.1/24"
HOST = f"root@{ADDRESS}"
NODE = "/run/skep/skep.sock"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_package(tmp_path_factory.mktemp("package"), "1.0.0")


@pytest.fixture
def machine(package: Path, tmp_path: Path) -> Iterator[BootedMachine]:
    with a_booted_machine("bookworm", tmp_path, package, has_ssh_alone=True) as made:
        yield made


class Client:
    """Commands in its network, with an ``ssh`` that the machine lets in."""

    def __init__(self, folder: Path, pid: int, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self.within = ("nsenter", f"--net=/proc/{pid}/ns/net")

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*self.within, *command],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        print(f"$ {command}\n{done.stdout}{done.stderr}")
        return done

    def up(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        return self.run(SKEP, "up", *words, HOST)


@pytest.fixture
def client(machine: BootedMachine, tmp_path: Path) -> Iterator[Client]:
    """At the other end of the machine's cable."""
    key = tmp_path / "user"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True, timeout=30)
    public = key.with_suffix(".pub").read_text().strip()
    machine.run(f"umask 077; mkdir -p /root/.ssh; echo '{public}' >/root/.ssh/authorized_keys")
    host_key = (machine.directory / "etc/ssh/ssh_host_ed25519_key.pub").read_text()
    environment = write_client(tmp_path, ADDRESS, host_key)
    with subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "echo made; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"made\n"
        client = Client(tmp_path, holder.pid, environment)
        subprocess.run(
            [
                "nsenter",
                "-t",
                str(machine.pid),
                "--net",
                "ip",
                "link",
                "set",
                "eth1",
                "netns",
                str(holder.pid),
            ],
            check=True,
            timeout=30,
        )
        for change in (f"address add {GATEWAY} dev eth1", "link set eth1 up", "link set lo up"):
            done = client.run("ip", *change.split())
            assert done.returncode == 0, done.stderr
        yield client
        holder.terminate()


def state(machine: BootedMachine) -> tuple[str, str, str]:
    """What another ``up`` could change: packages and files, the unit and its run, the cluster."""
    found = machine.run(
        r"find /etc /root /tmp -printf '%p %i %T@\n'; find /var/lib/dpkg -maxdepth 1 -printf '%p %i %T@\n';"
        "systemctl show skep -p InvocationID -p MainPID -p NRestarts -p UnitFileState"
    )
    api = machine.client().api
    swarm = api.inspect_swarm()
    nodes = [(node["ID"], node["Spec"], node["CreatedAt"]) for node in api.nodes()]
    return found, repr((swarm["ID"], swarm["Spec"], swarm["JoinTokens"])), repr(nodes)


def test_a_bare_machine_becomes_a_cluster_and_the_same_command_again_changes_nothing(
    machine: BootedMachine, client: Client, package: Path
) -> None:
    has = "command -v skep runc conmon nft ip || true; systemctl is-active ssh"
    assert machine.run(has) == "active\n"
    without = client.up()
    assert without.returncode == 1
    assert f"{HOST}: Skep is not installed. Install it with --package skep.deb." in without.stderr
    dry = client.up("--dry-run", "--package", package)
    assert dry.returncode == 0, dry.stderr
    assert f"{HOST}: is suitable: Debian GNU/Linux 12 (bookworm), kernel " in dry.stderr
    assert machine.run(has) == "active\n"

    first = client.up("--package", package)
    assert first.returncode == 0, first.stderr
    assert f"{HOST}: installs {package.name}" in first.stderr
    assert f"{HOST}: created the cluster" in first.stderr
    assert machine.run("find /root /tmp -name '*.deb'") == ""
    said, _, command = first.stdout.strip().partition(": ")
    assert said == "1 machine in the cluster"
    status = client.run(Path(SKEP).with_name(command.split()[0]), *shlex.split(command)[1:])
    assert status.returncode == 0, status.stderr
    name = machine.run("hostname").strip()
    assert name in status.stdout
    environment = client.environment
    with a_forwarded_socket(
        client.folder, NODE, HOST, environment=environment, within=client.within
    ) as socket:
        listed = client.run(
            CLIS[-1], "-H", socket, "node", "ls", "--format", "{{.Hostname}} {{.Status}} {{.ManagerStatus}}"
        )
    assert listed.stdout == f"{name} Ready Leader\n", listed.stderr

    before = state(machine)
    again = client.up("--package", package)
    assert again.returncode == 0, again.stderr
    assert again.stdout == first.stdout
    assert again.stderr.splitlines()[1:] == [f"{HOST}: already in a cluster"]
    assert state(machine) == before
