"""Nodes with ``userns-remap``: beside a node without it in one cluster, and beside a real Docker Engine with it."""

import asyncio
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from skep.errors import FailedPrecondition
from skep.node.host.user_remap import Accounts, read_accounts, resolve
from skep.playground.images.busybox import busybox_archive
from tests.support.harness.documents import shell_blocks
from tests.support.machines.accounts import FIRST, skep_with, with_dockremap
from tests.support.machines.docker_engines import wait_inside
from tests.support.machines.plain_engine import docker, engine_in
from tests.support.machines.playground_rig import (
    CLIS,
    IDLE,
    IMAGE,
    TestCluster,
    TestNode,
    a_playground,
    create,
    wait_running,
    wait_until,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

REMAP = 'userns-remap = "default"\n'
MAP = f"         0  {FIRST}      65536\n"


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    """Yield a cluster whose node m1 maps no users, and whose node w1 maps them."""
    with (
        with_dockremap() as enter,
        tempfile.TemporaryDirectory(prefix="skep-users-", dir="/var/tmp") as place,
        a_playground(
            "users",
            configured={"w1": REMAP},
            command=skep_with(enter, Path(place)),
            managers=1,
            workers=1,
        ) as made,
    ):
        yield made


@pytest.fixture
def m1(cluster: TestCluster) -> TestNode:
    return cluster.node("m1")


@pytest.fixture
def w1(cluster: TestCluster) -> Iterator[TestNode]:
    node = cluster.node("w1")
    yield node
    for id in node.docker("ps", "-aq", "--filter", "label=mapped").stdout.split():
        node.docker("rm", "-f", "-v", id, check=False)


def inside(node: TestNode, *words: str, command: str) -> str:
    """Run a command in a new container, and return its output."""
    return node.docker("run", "--rm", "--label", "mapped", *words, IMAGE, "sh", "-c", command).stdout


def daemon_of(node: TestNode) -> int:
    """Return the pid of the node's process, by its network, whose pin is in another mount namespace."""
    network = os.readlink(f"/proc/{node.description['pids'][0]}/ns/net")
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            is_node = Path(f"/proc/{entry}/comm").read_text().strip() == "skep-node"
            if is_node and os.readlink(f"/proc/{entry}/ns/net") == network:
                return int(entry)
    raise AssertionError(f"{node.name} does not run")


def test_root_of_a_container_is_an_ordinary_user_of_the_machine(w1: TestNode, m1: TestNode) -> None:
    assert "name=userns" in w1.docker("info", "--format", "{{.SecurityOptions}}").stdout
    assert "name=userns" not in m1.docker("info", "--format", "{{.SecurityOptions}}").stdout
    assert inside(w1, command="cat /proc/self/uid_map") == MAP
    assert inside(w1, "--userns", "host", command="cat /proc/self/uid_map").split()[1] == "0"
    assert inside(m1, command="cat /proc/self/uid_map").split()[1] == "0"
    w1.docker("run", "-d", "--label", "mapped", "--name", "top", IMAGE, *IDLE)
    assert set(w1.docker("top", "top", "-o", "pid,uid").stdout.split()[3::2]) == {str(FIRST)}
    assert w1.docker("exec", "-u", "7", "top", "id", "-u").stdout == "7\n"


def test_volumes_builds_commits_and_copies_have_the_containers_ids(w1: TestNode, tmp_path: Path) -> None:
    context = tmp_path / "context"
    context.mkdir()
    (context / "file").write_text("x")
    (context / "Dockerfile").write_text(
        f"FROM {IMAGE}\nRUN mkdir /data && echo a > /data/a && chown 7:8 /data /data/a\nCOPY file /copied\n"
        "RUN stat -c %u:%g /copied /data > /seen\nVOLUME /data\n"
    )
    w1.docker("build", "-q", "-t", "own:1", str(context))
    words = ("run", "--rm", "--label", "mapped", "-v", "vol:/data", "own:1", "sh", "-c")
    shown = w1.docker(*words, "cat /seen; stat -c %u:%g /data /data/a; touch /data/b").stdout
    assert shown == "0:0\n7:8\n7:8\n7:8\n"
    directory = w1.docker("volume", "inspect", "--format", "{{.Mountpoint}}", "vol").stdout.strip()
    assert {name: (Path(directory) / name).stat().st_uid for name in ("a", "b")} == {"a": 7, "b": 0}
    data = Path(directory).parents[2]
    for name in ("containers", "images", "volumes"):  # set-user-id files of containers' roots lie there
        assert (data / name).stat().st_mode & 0o077 == 0
    assert w1.docker(
        "run", "--rm", "--userns=host", "-v", "vol:/data", IMAGE, "ls", "-n", "/data"
    ).stdout.count(" 7 ")
    w1.docker("run", "-d", "--label", "mapped", "--name", "box", IMAGE, *IDLE)
    w1.docker("cp", "-a", str(context / "file"), "box:/root/file")
    w1.docker("exec", "box", "chown", "5:6", "/root/file")
    w1.docker("commit", "box", "own:2")
    for users in ("", "host"):
        option = ("--userns", users) if users else ()
        shown = w1.docker("run", "--rm", *option, "own:2", "stat", "-c", "%u:%g", "/root/file").stdout
        assert shown == "5:6\n"


def test_files_of_the_machine_stay_the_machines(w1: TestNode, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="skep-users-", dir="/var/tmp") as place:
        os.chmod(place, 0o755)
        done = w1.docker(
            *("run", "--rm", "-v", f"{place}:/b", IMAGE, "sh", "-c", "stat -c %u /b; touch /b/x"), check=False
        )
        assert done.stdout == "65534\n"
        assert "Permission denied" in done.stderr
        assert os.listdir(place) == []


def test_tasks_of_both_nodes_reach_each_other_by_name_virtual_address_and_port(
    m1: TestNode, w1: TestNode
) -> None:
    m1.docker("network", "create", "-d", "overlay", "--attachable", "net")
    m1.docker("secret", "create", "token", "-", stdin="secret")
    serve = (
        "stat -c %u:%g:%a /run/secrets/token > /tmp/index.html; cat /run/secrets/token >> /tmp/index.html;"
        " exec httpd -f -p 80 -h /tmp"
    )
    secret = ("--secret", "source=token,uid=99,gid=98,mode=0400", "--user", "99:98")
    for name, place, port in (("plain", "m1", "8001"), ("mapped", "w1", "8002")):
        where = ("--constraint", f"node.hostname=={place}", "--network", "net", "-p", f"{port}:80")
        create(m1, name, 2, *where, *secret, "--mount", "type=tmpfs,target=/tmp", command=("sh", "-c", serve))
    for name in ("plain", "mapped"):
        wait_running(m1, name, 2)
    for node in (m1, w1):
        node.docker("run", "-d", "--label", "mapped", "--name", "client", "--network", "net", IMAGE, *IDLE)
        gateway = node.docker("network", "inspect", "bridge", "-f", "{{(index .IPAM.Config 0).Gateway}}")
        for name, port in (("plain", "8001"), ("mapped", "8002")):
            wait_inside(node, "client", "99:98:400\nsecret", "wget", "-qO-", f"http://{name}/")
            wait_inside(node, "client", "secret", "wget", "-qO-", f"http://{gateway.stdout.strip()}:{port}/")
            wait_inside(node, "client", " 0% packet loss", "ping", "-c", "1", "-W", "1", f"tasks.{name}")
    m1.docker("rm", "-f", "client")
    m1.docker("service", "rm", "plain", "mapped")


def test_a_task_that_needs_the_machines_network_is_not_placed_there(m1: TestNode, w1: TestNode) -> None:
    create(m1, "host", 1, "--constraint", "node.facts.userns==remap", "--network", "host")
    wait_until(
        lambda: (
            "not possible on 1 node with userns-remap"
            in m1.docker("service", "ps", "--no-trunc", "host").stdout
        ),
        "the task waits",
    )
    m1.docker("service", "update", "--constraint-rm", "node.facts.userns==remap", "--detach", "host")
    wait_running(m1, "host", 1)
    m1.docker("service", "rm", "host")


def test_a_device_may_have_another_path(w1: TestNode) -> None:
    found = inside(w1, "--device", "/dev/zero:/dev/sensor", command="stat -c %t:%T /dev/sensor")
    assert found.strip() == "1:5"


def test_a_container_of_another_mapping_is_kept_apart(cluster: TestCluster, w1: TestNode) -> None:
    w1.docker("run", "-d", "--label", "mapped", "--name", "old", IMAGE, *IDLE)
    (cluster.directory / "w1" / "skep.toml").write_text("")
    w1.kill(daemon_of(w1))
    options = ("info", "--format", "{{.SecurityOptions}}")
    wait_until(lambda: "name=seccomp" in w1.docker(*options, check=False).stdout, "the node responds again")
    assert "name=userns" not in w1.docker(*options).stdout
    try:
        assert w1.docker("exec", "old", "cat", "/proc/self/uid_map").stdout == MAP
        assert w1.docker("cp", "old:/etc/passwd", "-").returncode == 0
        refused = w1.docker("restart", "-t", "0", "old", check=False).stderr
        assert (
            "created with another userns-remap than the node has now: remove it and create it again"
            in refused
        )
    finally:
        (cluster.directory / "w1" / "skep.toml").write_text(REMAP)


def test_the_guides_commands_and_those_of_the_refusal_create_the_user() -> None:
    (guide,) = shell_blocks("docs/guide/security.md")
    with pytest.raises(FailedPrecondition) as refused:
        resolve("default", Accounts(users={}, groups={}, subuid="", subgid=""))
    _, _, commands = str(refused.value).partition("needs the user dockremap: ")
    for block in (guide, commands):
        found = _accounts_after(block)
        users = resolve("default", found)
        assert users is not None
        assert users.groups_count == 65536


def _accounts_after(commands: str) -> Accounts:
    """Run commands on a copy of the machine's accounts, without the user ``dockremap``."""
    with tempfile.TemporaryDirectory(prefix="skep-accounts-", dir="/var/tmp") as name:
        place = Path(name)
        for part in ("upper", "work"):
            (place / part).mkdir(mode=0o755)
        script = (
            f"mount -t overlay -o lowerdir=/etc,upperdir={place}/upper,workdir={place}/work overlay /etc\n"
            f"touch /etc/subuid /etc/subgid; ! id dockremap || userdel dockremap\n{commands}\n"
            f"mkdir {place}/made && cp /etc/passwd /etc/group /etc/subuid /etc/subgid {place}/made"
        )
        enter = ("unshare", "--mount", "--propagation", "private", "sh", "-ec")
        subprocess.run((*enter, script), check=True, capture_output=True, timeout=60)
        return read_accounts(place / "made")


# --- beside a real Docker Engine ----------------------------------------------------------------------------------


Ask = Callable[..., tuple[int, str]]


@contextmanager
def skep_node() -> Iterator[Ask]:
    with (
        with_dockremap() as enter,
        tempfile.TemporaryDirectory(prefix="skep-users-", dir="/var/tmp") as place,
        a_playground("beside", configured={"m1": REMAP}, command=skep_with(enter, Path(place))) as cluster,
    ):
        node = cluster.node("m1")

        def ask(*words: str) -> tuple[int, str]:
            done = node.docker(*words, cli=CLIS[0], check=False)
            return done.returncode, done.stdout + done.stderr

        yield ask


@contextmanager
def docker_node() -> Iterator[Ask]:
    directory = Path(tempfile.mkdtemp(prefix="skep-users-", dir="/var/tmp"))
    directory.chmod(0o711)
    with (
        with_dockremap() as enter,
        engine_in(
            directory,
            *enter,
            *("unshare", "-n"),
            before="ip link set lo up",
            options="--userns-remap=default --bridge=none --iptables=false",
        ) as socket,
    ):
        assert docker(socket, "load", stdin=asyncio.run(busybox_archive()).data).returncode == 0

        def ask(*words: str) -> tuple[int, str]:
            done = docker(socket, *words)
            return done.returncode, (done.stdout + done.stderr).decode()

        yield ask


QUESTIONS = (
    ("info", "--format", "{{.SecurityOptions}}"),
    ("run", "--rm", "--net=none", IMAGE, "sh", "-c", "id -u; cat /proc/self/uid_map /proc/self/setgroups"),
    ("run", "--rm", "--net=none", IMAGE, "stat", "-c", "%u:%g", "/", "/proc", "/etc/hosts", "/dev/shm"),
    ("run", "--rm", "--net=none", "-u", "7", IMAGE, "sh", "-c", "echo x > /dev/stdout; echo y > /dev/stderr"),
    ("run", "--rm", "--privileged", IMAGE, "true"),
    ("run", "--rm", "--net=host", IMAGE, "true"),
    ("run", "--rm", "--net=none", "--pid=host", IMAGE, "true"),
    ("run", "--rm", "--net=none", "--userns=host", IMAGE, "cat", "/proc/self/uid_map"),
    ("run", "--rm", "--net=none", "--userns=other", IMAGE, "true"),
    ("run", "--rm", "--net=none", IMAGE, "mknod", "/x", "c", "1", "3"),
    ("run", "--rm", "--net=none", "-v", "/var/lib:/b", IMAGE, "sh", "-c", "stat -c %u:%g /b; touch /b/x"),
    ("run", "--rm", "--net=none", "--tmpfs", "/t:uid=5", IMAGE, "stat", "-c", "%u:%g:%a", "/t"),
    ("run", "--rm", "--net=none", IMAGE, "stat", "-c", "%u:%g:%a", "/dev/zero"),
    ("run", "--rm", "--net=none", "--read-only", IMAGE, "touch", "/x"),
    ("run", "-d", "--net=none", "--name=box", "-v", "vol:/home", IMAGE, *IDLE),
    ("inspect", "--format", "{{.HostConfig.UsernsMode}}", "box"),
    ("exec", "box", "sh", "-c", "id -u; touch /home/x; stat -c %u:%g /home/x"),
    ("exec", "--privileged", "box", "id", "-u"),
    ("top", "box", "-o", "uid,pid"),
    ("run", "--rm", "--net=container:box", IMAGE, "cat", "/proc/self/uid_map"),
    ("run", "--rm", "--net=none", "--pid=container:box", IMAGE, "cat", "/proc/self/uid_map"),
    ("commit", "box", "made:1"),
    ("run", "--rm", "--net=none", "made:1", "stat", "-c", "%u:%g", "/", "/etc/passwd"),
    ("rm", "-f", "box"),
)


@pytest.mark.needs("dockerd")
def test_it_answers_as_a_real_docker_engine_with_the_same_option_does() -> None:
    with docker_node() as ask:
        expected = [(words, _shown(ask(*words))) for words in QUESTIONS]
    with skep_node() as ask:
        found = [(words, _shown(ask(*words))) for words in QUESTIONS]
    assert found == expected


def _shown(response: tuple[int, str]) -> tuple[int, str]:
    """Return exit code and output, without ids."""
    code, text = response
    if text.startswith("UID "):
        text = text.split()[2]
    kept = [line for line in text.splitlines() if not line.startswith(("sha256:", "[name="))]
    mapped = ["userns"] if "name=userns" in text else []
    return code, "\n".join(mapped + ["ID" if len(line) == 64 and line.isalnum() else line for line in kept])
