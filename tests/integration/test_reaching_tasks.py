"""``skep exec`` and its like: containers on any node, from any manager."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.request import urlopen

import pytest
from docker.types import ContainerSpec, RestartPolicy, TaskTemplate

from tests.support.clients.terminal import Terminal, terminal
from tests.support.machines.playground_rig import (
    IDLE,
    IMAGE,
    SKEP,
    TestCluster,
    TestNode,
    a_playground,
    nodes_by_name,
    remove_services,
    wait_running,
    wait_until,
)

pytestmark = pytest.mark.timeout(180)

NODES = ("m1", "m2", "w1")


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    """Two managers and a worker, with a task of the global service ``web`` on each."""
    with a_playground("reach", managers=2, workers=1) as cluster:
        m1 = cluster.node("m1")
        wait_until(lambda: len(nodes_by_name(m1)) == len(NODES), "all nodes are there")
        options = ("--mode", "global", "--hostname", "on-{{.Node.Hostname}}", "--env", "COLOUR=red")
        m1.docker("service", "create", "--detach", "--name", "web", *options, IMAGE, *IDLE)
        wait_running(m1, "web", len(NODES), 60)
        yield cluster
        remove_services(m1)


@pytest.fixture(params=["m1", "m2"])
def manager(request: pytest.FixtureRequest, cluster: TestCluster) -> TestNode:
    """Either: the worker's session is another one's for one of them."""
    return cluster.node(request.param)


@contextmanager
def following(node: TestNode, *words: str) -> Iterator[Iterator[Any]]:
    """``skep events`` while the block runs, without the messages about its progress."""
    command = [SKEP, "--host", node.socket, "events", "--json", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        events = (json.loads(line) for line in process.stdout)
        try:
            yield (one for one in events if one["Action"] != "progress")
        finally:
            process.terminate()


def skep(
    node: TestNode, *words: str, stdin: bytes = b"", within_s: float = 60
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [SKEP, "-H", node.socket, *words], input=stdin, capture_output=True, timeout=within_s, check=False
    )


def test_a_command_runs_on_any_node_with_its_input_outputs_and_exit_code(manager: TestNode) -> None:
    script = 'cat; hostname; pwd; id -u; echo "$COLOUR $SHAPE" >&2; exit 7'
    options = ("-i", "-e", "SHAPE=round", "-w", "/tmp", "-u", "nobody")
    for name in NODES:
        done = skep(manager, "exec", *options, f"web.{name}", "sh", "-c", script, stdin=b"from here\n")
        assert done.stdout.decode() == f"from here\non-{name}\n/tmp\n65534\n"
        assert done.stderr == b"red round\n"
        assert done.returncode == 7


def test_events_of_every_node_come_at_any_manager_and_go_on_at_another(cluster: TestCluster) -> None:
    m1, m2, w1 = (cluster.node(name) for name in NODES)
    with following(m1, "--nodes", "all") as events:
        followed = {next(one["Actor"]["Attributes"]["name"] for one in events) for _ in NODES}
        assert followed == set(NODES)
        w1.docker("volume", "create", "kept")
        w1.docker("run", "--rm", "--network", "none", "--volume", "kept:/data", IMAGE, "true")
        of_run = []
        while not of_run or of_run[-1]["Action"] != "destroy":
            event = next(events)
            if event["Actor"]["Attributes"].get("node.name") == "w1" and "exec" not in event["Action"]:
                of_run.append(event)
    shown = [f"{one['Type']} {one['Action']}" for one in of_run]
    wanted = ["volume create", "container create", "volume mount", "container start", "container die"]
    assert [one for one in shown if one in wanted] == wanted
    w1.docker("volume", "rm", "kept")

    cursor = next(one["Cursor"] for one in of_run if one["Action"] == "start")
    with following(m2, "--nodes", "w1", "--after", cursor) as events:
        later = [next(events)]
        while later[-1]["Actor"]["ID"] != "kept" or later[-1]["Action"] != "destroy":
            later.append(next(events))
    ids = {of_run[-1]["Actor"]["ID"], "kept"}
    shown = [f"{one['Type']} {one['Action']}" for one in later if one["Actor"]["ID"] in ids]
    assert sorted(shown) == ["container destroy", "container die", "volume destroy", "volume unmount"]

    options = ("--since", "10m", "--until", "0s", "--format", "{{json .}}", "--filter", "type=volume")
    for manager in (m1, m2):

        def everywhere(manager: TestNode = manager) -> list[tuple[str, str]]:
            shown = manager.docker("events", *options, "--filter", "scope=swarm").stdout
            actors = [(one["Action"], one["Actor"]) for one in map(json.loads, shown.splitlines())]
            return [(action, one["Attributes"]["node.name"]) for action, one in actors if one["ID"] == "kept"]

        # The command counts in whole seconds.
        found = wait_until(lambda: [one for one in everywhere() if "destroy" in one], "all of it is past")
        assert found == [("destroy", "w1")]
        assert ("create", "w1") in everywhere()
        assert manager.docker("events", *options).stdout == "", "without the scope they are Docker's"


def test_megabytes_pass_in_both_directions(manager: TestNode) -> None:
    sent = os.urandom(5_000_000)
    done = skep(manager, "exec", "-i", "web.w1", "cat", stdin=sent)
    assert done.stdout == sent


def test_what_cannot_be_executed_is_refused_as_docker_does(manager: TestNode) -> None:
    missing = skep(manager, "exec", "web.w1", "/no/such/command")
    assert missing.returncode == 127
    assert b"no such file or directory" in missing.stdout + missing.stderr
    nowhere = skep(manager, "exec", "web.w9", "true")
    assert nowhere.returncode == 1
    assert nowhere.stderr == b"Error: service web has no task w9\n"
    # Neither a service nor a task: docker is asked, for containers of this node.
    unknown = skep(manager, "exec", "nothing", "true")
    assert unknown.returncode == 1
    assert b"No such container: nothing" in unknown.stderr
    (container,) = manager.docker("ps", "-q").stdout.split()
    assert skep(manager, "exec", container, "hostname").stdout.decode() == f"on-{manager.name}\n"


def test_files_are_copied_both_ways_as_by_docker(manager: TestNode, tmp_path: Path) -> None:
    (tmp_path / "site" / "sub").mkdir(parents=True)
    (tmp_path / "site" / "sub" / "page").write_bytes(content := os.urandom(300_000))
    assert done(manager, "cp", str(tmp_path / "site"), "web.w1:/tmp") == b""
    assert done(manager, "exec", "web.w1", "cat", "/tmp/site/sub/page") == content
    assert done(manager, "cp", "web.w1:/tmp/site/.", str(tmp_path / "back")) == b""
    assert (tmp_path / "back" / "sub" / "page").read_bytes() == content
    archive = done(manager, "cp", "web.w1:/etc/hostname", "-")
    with tarfile.open(fileobj=io.BytesIO(archive)) as members:
        assert members.getnames() == ["hostname"]
    missing = skep(manager, "cp", "web.w1:/no/such", str(tmp_path))
    assert missing.returncode == 1
    # Clients before 23 have words of their own.
    assert re.search(
        b"Could not find the file /no/such in container|No such container:path: ", missing.stderr
    )
    assert done(manager, "exec", "web.w1", "rm", "-r", "/tmp/site") == b""


def test_what_runs_in_a_task_is_shown(manager: TestNode) -> None:
    shown = done(
        manager, "stats", "--no-stream", "--format", "{{.Name}} {{.PIDs}}", "web.w1", "web.m1"
    ).decode()
    assert [line.split(".")[0] for line in shown.splitlines()] == ["web", "web"]
    assert "trap 'exit 0'" in done(manager, "task", "top", "web.w1", "-o", "pid,args").decode()


def test_the_output_of_a_task_is_attached_to(cluster: TestCluster, manager: TestNode) -> None:
    command = [SKEP, "-H", manager.socket, "attach", "--no-stdin", "web.w1"]
    client = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert client.stdout is not None
    try:
        reading = Thread(target=lambda: client.stdout.read(1) and client.terminate())
        reading.start()
        wait_until(
            lambda: (
                done(manager, "exec", "web.w1", "sh", "-c", "echo x > /proc/1/fd/1") == b""
                and not reading.is_alive()
            ),
            "the attached client gets a line",
        )
    finally:
        client.kill()
        client.wait()
        reading.join()
        client.stdout.close()


def test_input_reaches_a_task_of_another_node_that_is_attached_to(manager: TestNode) -> None:
    container = ContainerSpec(IMAGE, ["sh", "-c", "read line; echo got $line"], open_stdin=True)
    policy = RestartPolicy(condition="none")
    template = TaskTemplate(container, placement=["node.hostname==w1"], restart_policy=policy)
    api = manager.client().api
    service = api.create_service(template, name="reader")
    try:
        wait_running(manager, "reader", 1)
        command = [SKEP, "-H", manager.socket, "attach", "reader"]
        ran = subprocess.run(command, input=b"hello\n", capture_output=True, timeout=60, check=False)
        assert (ran.returncode, ran.stdout) == (0, b"got hello\n"), ran.stderr
    finally:
        api.remove_service(service["ID"])


def test_a_port_of_a_task_is_forwarded_wherever_it_listens(manager: TestNode) -> None:
    serve = "echo found > /tmp/index.html; httpd -p 127.0.0.1:8080 -h /tmp"
    done(manager, "exec", "web.w1", "sh", "-c", f"pidof httpd || ({serve})")
    command = [SKEP, "-H", manager.socket, "port-forward", "web.w1", ":8080", ":9"]
    client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert client.stdout is not None
        ports = [int(client.stdout.readline().split()[0].rpartition(":")[2]) for _ in range(2)]
        for _ in range(3):
            with urlopen(f"http://127.0.0.1:{ports[0]}/", timeout=20) as response:
                assert response.read() == b"found\n"
        with socket.create_connection(("127.0.0.1", ports[1]), 20) as refused:
            assert refused.recv(1) == b""
    finally:
        client.terminate()
        _, said = client.communicate(timeout=20)
    assert "nothing listens on port 9 in container" in said


def test_a_command_runs_once_as_a_task_of_a_service_would(manager: TestNode) -> None:
    ran = skep(
        manager, "run", "-e", "SHAPE=round", "web", "sh", "-c", 'echo "$COLOUR $SHAPE"; echo err >&2; exit 3'
    )
    assert ran.stdout == b"red round\n"
    assert ran.stderr == b"err\n"
    assert ran.returncode == 3
    failed = skep(manager, "run", "web", "/no/such/command")
    assert failed.returncode != 0
    assert manager.docker("service", "ls", "--format", "{{.Name}}").stdout.split() == ["web"]


def test_a_command_runs_with_the_secrets_networks_and_mounts_of_its_service(cluster: TestCluster) -> None:
    m1 = cluster.node("m1")
    m1.docker("network", "create", "-d", "overlay", "back")
    m1.docker("secret", "create", "key", "-", stdin="hidden")
    m1.docker("config", "create", "settings", "-", stdin="red")
    m1.docker(
        *("service", "create", "--detach", "--name", "db", "--network", "back", "--hostname", "db-host"),
        *(
            "--secret",
            "source=key,target=pass,uid=65534,mode=0400",
            "--config",
            "source=settings,target=/etc/settings",
        ),
        *("--mount", "type=volume,source=data-of-db,target=/data", "--user", "nobody", "--workdir", "/data"),
        *("--constraint", "node.hostname == w1", "--stop-grace-period", "1s", IMAGE),
        *("sh", "-c", "echo kept >/tmp/x; exec sleep 1000"),
    )
    try:
        wait_running(m1, "db", 1, 60)
        script = (
            "cat /etc/settings /run/secrets/pass; echo; pwd; id -u; nslookup db | grep -c Name; "
            "grep -c ' /data ' /proc/mounts"
        )
        ran = skep(m1, "run", "db", "sh", "-c", script)
        assert ran.stdout.decode().splitlines() == ["redhidden", "/data", "65534", "1", "1"], ran
    finally:
        m1.docker("service", "rm", "db")
        wait_until(lambda: not m1.client().api.tasks(filters={"name": "db"}), "its task is removed")
        m1.docker("secret", "rm", "key")
        m1.docker("config", "rm", "settings")
        wait_until(
            lambda: m1.docker("network", "rm", "back", check=False).returncode == 0, "the network is free"
        )


def done(node: TestNode, *words: str) -> bytes:
    """The output of a command that succeeds."""
    ran = skep(node, *words)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_a_terminal_has_this_ones_size_however_often_that_changes(manager: TestNode) -> None:
    # setsid: the terminal is the command's own, so that the kernel tells it of a new size.
    command = ["setsid", "-c", "-w", SKEP, "-H", manager.socket, "exec", "-it", "web.w1", "sh"]
    with terminal(command, {}) as screen:
        screen.wait_shown("# ")
        for number in range(1000):
            screen.resize(20 + number % 30, 80 + number % 50)
        screen.resize(44, 111)
        wait_size(screen, "44 111")
        screen.type("exit 5\n")
        assert screen.wait_end() == 5
    assert "Traceback" not in screen.shown
    assert "ignored" not in screen.shown


def wait_size(screen: Terminal, size: str) -> None:
    """Ask until the last size has arrived."""
    deadline = time.monotonic() + 20
    while size not in screen.shown:
        assert time.monotonic() < deadline, f"no {size} in {screen.shown!r}"
        screen.shown = ""
        screen.type("stty size; echo asked-$((1+1))\n")
        screen.wait_shown("asked-2")


def test_nothing_is_left_when_a_client_vanishes(cluster: TestCluster) -> None:
    m2, w1 = cluster.node("m2"), cluster.node("w1")
    before = descriptors(w1)
    clients = [
        subprocess.Popen(
            [SKEP, "-H", m2.socket, "exec", "web.w1", "sh", "-c", "while echo x; do sleep 0.1; done"],
            stdout=subprocess.PIPE,
        )
        for _ in range(3)
    ]
    for client in clients:
        assert client.stdout is not None
        assert client.stdout.read(2) == b"x\n"
        client.send_signal(signal.SIGKILL)
        client.wait()
        client.stdout.close()
    wait_until(lambda: descriptors(w1) <= before + 1, "the node has closed what the clients had")
    assert skep(m2, "exec", "web.w1", "hostname").stdout == b"on-w1\n"


def descriptors(node: TestNode) -> int:
    """Open sockets of the node's processes."""
    count = 0
    for pid, comm in node.processes():
        if comm.startswith("skep"):
            try:
                names = os.listdir(f"/proc/{pid}/fd")
            except OSError:
                continue
            count += sum(is_socket(pid, name) for name in names)
    return count


def is_socket(pid: int, name: str) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:")
    except OSError:
        return False
