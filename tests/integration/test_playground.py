"""The playground's verbs, on real nodes; and that nothing of it stays."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from skep.linux.processes import stat_of
from tests.support.machines.footprint import inhabitants, machine, survivors
from tests.support.machines.playground_rig import (
    CLIS,
    IMAGE,
    SKEP,
    TestCluster,
    a_playground,
    container_pids,
    create,
    no_playground_yet,
    wait_running,
    wait_until,
)


@pytest.fixture(scope="module")
def trio() -> Iterator[TestCluster]:
    """One manager and two workers on two routed networks."""
    with a_playground("trio", managers=1, workers=2, subnets=2) as cluster:
        yield cluster


@pytest.fixture
def nowhere() -> Iterator[TestCluster]:
    """A playground that is not up; whatever the test makes of it is removed."""
    with no_playground_yet("lone") as cluster:
        yield cluster


def states(cluster: TestCluster) -> dict[str, str]:
    """Node -> the word that ``ps`` has for it."""
    lines = cluster.skep("ps").stdout.splitlines()[1:]
    return {line.split()[0]: line.split()[2] for line in lines}


def reaches(cluster: TestCluster, source: str, target: str) -> bool:
    """Whether one node gets an answer to a ping of another's address."""
    address = cluster.node(target).description["addr"]
    done = cluster.skep("exec", source, "--", "busybox", "ping", "-c", "1", "-W", "1", address, check=False)
    return done.returncode == 0


def test_all_nodes_come_up_as_one_swarm(trio: TestCluster) -> None:
    assert states(trio) == {"m1": "up", "w1": "up", "w2": "up"}
    listed = trio.node("m1").docker("node", "ls", "--format", "{{.Hostname}} {{.Status}} {{.ManagerStatus}}")
    assert sorted(listed.stdout.splitlines()) == ["m1 Ready Leader", "w1 Ready ", "w2 Ready "]


def test_every_node_has_the_same_small_image(trio: TestCluster) -> None:
    for node in ("m1", "w1", "w2"):
        shown = (
            trio.node(node).docker("image", "inspect", "--format", "{{.Id}} {{.Size}}", IMAGE).stdout.split()
        )
        assert shown[0] == trio.description["image"]
        assert int(shown[1]) < 5_000_000


def test_nodes_are_spread_over_routed_networks(trio: TestCluster) -> None:
    networks = {node["addr"].rsplit(".", 1)[0] for node in trio.description["nodes"]}
    assert len(networks) == 2
    assert reaches(trio, "w1", "m1")
    assert reaches(trio, "m1", "w2")


def test_the_description_is_what_measuring_tools_read(trio: TestCluster) -> None:
    for node in trio.description["nodes"]:
        assert Path(node["netns"]).exists()
        assert Path(node["state_dir"]).is_dir()
        assert all(Path(f"/proc/{pid}").exists() for pid in node["pids"])
        namespace, interface = node["link"]
        subprocess.run(["ip", "-n", namespace, "link", "show", interface], check=True, capture_output=True)


def test_a_command_runs_on_the_node(trio: TestCluster) -> None:
    assert trio.skep("exec", "w1", "--", "cat", "/proc/sys/kernel/hostname").stdout == "w1\n"
    assert trio.skep("exec", "w1", "--", "sh", "-c", "exit 7", check=False).returncode == 7
    assert os.uname().nodename != "w1"


def test_env_points_docker_at_a_node(trio: TestCluster) -> None:
    line = trio.skep("env", "w2").stdout
    script = f"{line} {CLIS[-1]} info --format '{{{{.Name}}}}'"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout == "w2\n"


def test_a_cut_node_is_alone_until_it_is_mended(trio: TestCluster) -> None:
    trio.skep("cut", "w1")
    try:
        assert states(trio)["w1"] == "cut"
        assert not reaches(trio, "m1", "w1")
    finally:
        trio.skep("reconnect", "w1")
    wait_until(lambda: reaches(trio, "m1", "w1"), "the mended node answers")


def pings_heard(cluster: TestCluster, name: str) -> int:
    """How many pings have arrived at a node, answered or not."""
    table = cluster.skep("exec", name, "--", "cat", "/proc/net/snmp").stdout
    head, values = (line.split() for line in table.splitlines() if line.startswith("Icmp:"))
    return int(values[head.index("InEchos")])


@pytest.mark.parametrize(("way", "is_heard"), [("in", False), ("out", True)])
def test_a_node_can_be_cut_off_one_way_only(trio: TestCluster, way: str, is_heard: bool) -> None:
    before = pings_heard(trio, "w1")
    trio.skep("cut", "w1", "--only", way)
    try:
        assert states(trio)["w1"] == "half-cut"
        assert not reaches(trio, "m1", "w1")
        assert (pings_heard(trio, "w1") > before) is is_heard
    finally:
        trio.skep("reconnect", "w1")
    wait_until(lambda: reaches(trio, "m1", "w1"), "the mended node answers")
    assert states(trio)["w1"] == "up"


def test_a_paused_node_stands_still_until_it_is_resumed(trio: TestCluster) -> None:
    node = trio.node("w1")
    trio.skep("pause", "w1")
    try:
        stopped = [stat_of(pid) for pid, _ in node.processes()]
        assert stopped
        assert {stat.state for stat in stopped if stat is not None} == {"T"}
    finally:
        trio.skep("resume", "w1")
    node.docker("info")
    wait_until(lambda: states(trio)["w1"] == "up", "the node goes on")


def test_a_killed_node_is_dead_and_starts_again_with_its_disk(trio: TestCluster) -> None:
    before = trio.node("w2").description
    trio.skep("kill", "w2")
    assert states(trio)["w2"] == "down"
    assert list(trio.node("w2").processes()) == []
    assert not reaches(trio, "m1", "w2"), "the kernel of a node without power sends no answer"
    # As after a container whose namespace outlives it, and of an address that moved.
    ip = ("ip", "-n", Path(before["netns"]).name)
    subprocess.run((*ip, "link", "add", "former", "type", "bridge"), check=True)
    subprocess.run((*ip, "addr", "add", "192.168.100.99/24", "dev", "eth0"), check=True)
    subprocess.run(before["start"], check=True, capture_output=True, timeout=60)
    assert trio.node("w2").description["pids"] != before["pids"]
    interfaces = subprocess.run((*ip, "-br", "addr"), check=True, capture_output=True, text=True).stdout
    assert "former" not in interfaces
    assert "192.168.100.99" not in interfaces
    trio.node("w2").docker("image", "inspect", IMAGE)
    assert reaches(trio, "m1", "w2")


def test_a_node_that_was_cut_off_before_it_was_killed_starts_alone(trio: TestCluster) -> None:
    trio.skep("cut", "w2")
    try:
        trio.skep("kill", "w2")
        trio.skep("start", "w2")
        assert states(trio)["w2"] == "cut"
    finally:
        trio.skep("reconnect", "w2")
    wait_until(lambda: reaches(trio, "m1", "w2"), "the mended node answers")


def test_a_node_that_a_tool_killed_by_its_pids_starts_again(trio: TestCluster) -> None:
    """As measuring tools do it: SIGKILL for the named processes, then for all that live in the namespace."""
    node = trio.node("w2")
    for pid in [*node.description["pids"], *(pid for pid, _ in node.processes())]:
        with suppress(ProcessLookupError):  # it went with another one
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not list(node.processes()), "the node is dead")
    assert states(trio)["w2"] == "down"
    trio.skep("start", "w2")
    assert states(trio)["w2"] == "up"


def test_an_image_archive_is_loaded_into_every_node(trio: TestCluster, tmp_path: Path) -> None:
    archive = trio.directory / "images" / "busybox.tar"
    copy = tmp_path / "image.tar"
    copy.write_bytes(archive.read_bytes())
    trio.node("w1").docker("image", "rm", "--force", "busybox:latest")
    trio.skep("load", str(copy))
    trio.node("w1").docker("image", "inspect", "busybox:latest")


def test_a_service_is_spread_over_all_ready_nodes(trio: TestCluster) -> None:
    manager = trio.node("m1")
    wait_until(lambda: set(states(trio).values()) == {"up"}, "all nodes are up")
    manager.docker("node", "update", "--availability", "pause", "w2")
    create(manager, "spread", 4)
    tasks = wait_running(manager, "spread", 4)
    names = {node["ID"]: node["Description"]["Hostname"] for node in manager.client().api.nodes()}
    assert sorted(names[task["NodeID"]] for task in tasks) == ["m1", "m1", "w1", "w1"]
    manager.docker("node", "update", "--availability", "active", "w2")
    manager.docker("service", "scale", "--detach", "spread=6")
    tasks = wait_running(manager, "spread", 6)
    assert sorted(names[task["NodeID"]] for task in tasks) == ["m1", "m1", "w1", "w1", "w2", "w2"]
    manager.docker("service", "rm", "spread")


def test_a_node_that_its_file_keeps_from_starting_is_failing_until_the_file_is_right(
    trio: TestCluster,
) -> None:
    file = trio.directory / "w2" / "skep.toml"
    right = file.read_text()
    file.write_text(right + 'nothing-like-this = "x"\n')
    trio.skep("kill", "w2")
    try:
        failed = trio.skep("start", "w2", check=False)
        assert (failed.returncode, "keeps stopping" in failed.stderr) == (1, True), failed.stderr
        assert "there is no setting 'nothing-like-this'" in failed.stderr
        assert states(trio)["w2"] == "failing"
        again = trio.skep("start", "w2", check=False)
        assert (again.returncode, "keeps stopping" in again.stderr) == (1, True), again.stderr
    finally:
        file.write_text(right)
    trio.skep("start", "w2")
    assert states(trio)["w2"] == "up"


ECHO = """
import socket
served = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
served.bind(("", 7000))
while True:
    data, client = served.recvfrom(100)
    served.sendto(data.upper(), client)
"""


def check_udp_answers_at_this_machine(cluster: TestCluster) -> None:
    m1 = cluster.node("m1")
    create(m1, "udp", 1, "--publish", "7000:7000/udp")
    wait_running(m1, "udp", 1)
    (pid,) = container_pids(m1, "udp").values()

    def local_port() -> int:
        found = re.search(r"published port 7000/udp: udp://127.0.0.1:(\d+)", cluster.skep("ps").stdout)
        return int(found[1]) if found else 0

    port = wait_until(local_port, "the port is relayed")

    def answers() -> bool:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client, suppress(OSError):
            client.settimeout(1)
            client.sendto(b"hello", ("127.0.0.1", port))
            return client.recv(100) == b"HELLO"
        return False

    with subprocess.Popen(["nsenter", f"--net=/proc/{pid}/ns/net", sys.executable, "-c", ECHO]) as echo:
        try:
            wait_until(answers, "the service answers")
        finally:
            echo.kill()
    m1.docker("service", "rm", "udp")


def test_users_udp_clients_and_hosts_of_a_file_are_served(nowhere: TestCluster, tmp_path: Path) -> None:
    done = nowhere.skep("up", "--managers", "1", "--tls")
    command = re.search(r"users: skep user add NAME (.*)", done.stdout)
    assert command is not None, done.stdout
    m1, home = nowhere.node("m1"), {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    words = ("user", "add", "ann", *command[1].split())
    added = subprocess.run(
        [SKEP, "-H", m1.socket, *words], env=home, capture_output=True, text=True, timeout=60, check=False
    )
    assert added.returncode == 0, added.stderr
    listed = subprocess.run(
        [CLIS[-1], "--context", "ann", "node", "ls", "--format", "{{.Hostname}}"],
        env=home,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert listed.stdout.split() == ["m1"], listed.stderr
    assert "API over TLS: tcp://127.0.0.1:" in nowhere.skep("ps").stdout
    check_udp_answers_at_this_machine(nowhere)
    # The comment of a node's file invites to this.
    further = tmp_path / "further.sock"
    file = nowhere.directory / "m1" / "skep.toml"
    file.write_text(file.read_text().replace("hosts = [", f'hosts = ["unix://{further}", '))
    nowhere.skep("kill", "m1")
    nowhere.skep("start", "m1")
    assert further.is_socket()


def test_a_fresh_machine_is_plugged_in_and_belongs_to_no_swarm(trio: TestCluster) -> None:
    assert trio.skep("add", "worker").stdout.split()[0] == "w3"
    state = trio.node("w3").docker("info", "--format", "{{.Swarm.LocalNodeState}}").stdout.strip()
    assert state == "inactive"
    assert reaches(trio, "w3", "m1")
    trio.skep("add", "worker", "w3", check=False)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--managers", "0"], "at least one manager"),
        (["--subnets", "0"], "Use 1 to "),
        (["--workers", "-1"], "cannot be negative"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_made(
    nowhere: TestCluster, words: list[str], sentence: str
) -> None:
    done = nowhere.skep("up", *words, check=False)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert not nowhere.directory.exists()


def test_a_name_is_taken_while_its_playground_is_up(trio: TestCluster, tmp_path: Path) -> None:
    words = ["--dir", str(Path("/var/tmp") / f"skep-other-{os.getpid()}"), "--name", trio.name]
    done = subprocess.run(
        [SKEP, "playground", "up", *words], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert f"A playground called {trio.name} is running" in done.stderr


def test_down_leaves_nothing_of_a_playground_with_running_containers(nowhere: TestCluster) -> None:
    before = machine(nowhere.name, nowhere.directory.parent)
    nowhere.up(managers=1, workers=1)
    create(nowhere.node("m1"), "web", 3)
    wait_running(nowhere.node("m1"), "web", 3)
    living = inhabitants(nowhere.name)
    assert len(living.processes) > 10
    nowhere.down()
    left = survivors(living)
    assert sorted(left.processes) == []
    assert sorted(left.namespaces) == []
    assert machine(nowhere.name, nowhere.directory.parent).more_than(before) == {}


def test_down_twice_and_of_nothing_is_fine(nowhere: TestCluster) -> None:
    assert "Nothing to remove." in nowhere.skep("down").stderr


@pytest.mark.parametrize("reached", ["cluster.json", "m1/skep.log", "m1/data/images"])
def test_down_removes_what_a_crash_half_way_left(nowhere: TestCluster, reached: str) -> None:
    before = machine(nowhere.name, nowhere.directory.parent)
    where = ["--dir", str(nowhere.directory), "--name", nowhere.name]
    with subprocess.Popen(
        [SKEP, "playground", "up", *where], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as starting:
        wait_until(lambda: (nowhere.directory / reached).exists(), f"{reached} is there")
        starting.kill()
    living = inhabitants(nowhere.name)
    nowhere.down()
    assert sorted(survivors(living).processes) == []
    assert machine(nowhere.name, nowhere.directory.parent).more_than(before) == {}


def test_a_damaged_description_is_said_to_be_damaged(nowhere: TestCluster) -> None:
    nowhere.directory.mkdir()
    (nowhere.directory / "cluster.json").write_text('{"nodes": 7}')
    done = nowhere.skep("ps", check=False)
    assert done.returncode == 1
    assert "cluster.json" in done.stderr
    assert "Traceback" not in done.stderr
    (nowhere.directory / "cluster.json").unlink()


def test_the_description_is_json_that_any_tool_reads(trio: TestCluster) -> None:
    text = (trio.directory / "cluster.json").read_text()
    assert json.loads(text)["system"] == "skep"


def test_nodes_run_containers_on_cgroup_v2_as_well(nowhere: TestCluster) -> None:
    """The unified hierarchy alone, mounted over the machine's own in a private mount namespace.

    On a machine with v1 or hybrid cgroups it has no controllers, so limits are not shown here.
    """
    where = f"--dir {nowhere.directory} --name {nowhere.name}"
    docker = f"{CLIS[-1]} --host unix://{nowhere.directory}/m1/skep.sock"
    script = f"""
        umount --lazy /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup
        {SKEP} playground up {where}
        {docker} service create --quiet --name web --update-monitor 1ns {IMAGE} sleep 600
        find /sys/fs/cgroup/skep-playground/{nowhere.name}-m1/ctr -mindepth 1 -type d
        {SKEP} playground down {where}
        ! ls -d /sys/fs/cgroup/skep-playground/{nowhere.name}-m1
    """
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr + done.stdout
    assert f"/sys/fs/cgroup/skep-playground/{nowhere.name}-m1/ctr/" in done.stdout
