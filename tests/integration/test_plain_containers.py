"""Plain containers on nodes without an engine: ``docker run`` as users type it, on every kind of network."""

import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from skep.engine.confinement import apparmor
from tests.integration.test_published_ports import in_namespace
from tests.support.machines.docker_engines import attachments, inside, wait_inside
from tests.support.machines.playground_rig import (
    CLIS,
    IDLE,
    IMAGE,
    TestCluster,
    TestNode,
    a_playground,
    create,
    remove_services,
    wait_running,
    wait_until,
)

pytestmark = pytest.mark.timeout(180)

LABEL = ("--label", "plain")
SERVE = ("httpd", "-f", "-p", "80")


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    with a_playground("plain", managers=1, workers=1) as made:
        yield made


@pytest.fixture
def m1(cluster: TestCluster) -> Iterator[TestNode]:
    node = cluster.node("m1")
    yield node
    for one in (node, cluster.node("w1")):
        for id in one.docker("ps", "-aq", "--filter", "label=plain").stdout.split():
            one.docker("rm", "-f", "-v", id, check=False)
    remove_services(node)
    wait_until(lambda: not attachments(node), "no place of a container is left")
    for one in (node, cluster.node("w1")):
        one.docker("network", "prune", "-f")


@pytest.fixture
def w1(cluster: TestCluster) -> TestNode:
    return cluster.node("w1")


def run(node: TestNode, name: str, *words: str, command: tuple[str, ...] = IDLE) -> str:
    """A detached container; gives its id."""
    return node.docker("run", "-d", "--name", name, *LABEL, *words, IMAGE, *command).stdout.strip()


def refused(node: TestNode, *words: str) -> str:
    done = node.docker(*words, check=False)
    assert done.returncode != 0
    return done.stderr


def restart_daemon(node: TestNode) -> None:
    """End the node process the hard way; another one follows."""
    old = node.pids("skep-node")
    for pid in old:
        node.kill(pid)
    wait_until(lambda: set(node.pids("skep-node")) - set(old), "a new node process")
    wait_until(lambda: node.docker("ps", check=False).returncode == 0, "the node answers again")


@pytest.mark.slow
@pytest.mark.parametrize("cli", CLIS)
def test_run_takes_its_input_gives_its_output_and_exit_code_and_leaves_nothing(
    m1: TestNode, cli: str
) -> None:
    words = ("run", "--rm", "-i", *LABEL, IMAGE, "sh", "-c", "cat; echo oops >&2; exit 7")
    done = m1.docker(*words, cli=cli, stdin="to the end", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, "to the end", "oops\n")
    assert m1.docker("ps", "-aq", "--filter", "label=plain").stdout == ""


def test_names_are_resolved_both_ways_between_a_plain_container_and_tasks_of_other_nodes(
    m1: TestNode, w1: TestNode
) -> None:
    m1.docker("network", "create", "-d", "overlay", "--attachable", "net1")
    create(m1, "web", 1, "--network", "net1", "--constraint", "node.hostname==m1", command=IDLE)
    wait_running(m1, "web", 1)
    box = run(w1, "box", "--network", "net1", "--network-alias", "crate")
    (task,) = m1.docker("ps", "-q", "--filter", "name=web").stdout.split()
    for name in ("box", "crate", box[:12]):
        wait_inside(m1, task, " 0% packet loss", "ping", "-c", "1", "-W", "1", name)
    for name in ("web", "tasks.web"):
        wait_inside(w1, "box", " 0% packet loss", "ping", "-c", "1", "-W", "1", name)
    run(m1, "other", "--network", "net1")
    wait_inside(m1, "other", " 0% packet loss", "ping", "-c", "1", "-W", "1", "box")
    (shown,) = json.loads(w1.docker("network", "inspect", "net1").stdout)
    assert shown["Containers"][box]["Name"] == "box"
    assert "(container" in refused(m1, "network", "rm", "net1") or "(service web" in refused(
        m1, "network", "rm", "net1"
    )
    w1.docker("rm", "-f", "box")
    wait_until(lambda: len(attachments(m1)) == 1, "the place is given back")


@pytest.mark.slow
def test_a_container_outlives_the_daemon_with_its_endpoint_and_its_names(m1: TestNode, w1: TestNode) -> None:
    m1.docker("network", "create", "-d", "overlay", "--attachable", "net1")
    run(w1, "box", "--network", "net1")
    run(m1, "here", "--network", "net1")
    before = w1.docker("inspect", "-f", "{{.State.Pid}} {{json .NetworkSettings.Networks}}", "box").stdout
    restart_daemon(w1)
    after = w1.docker("inspect", "-f", "{{.State.Pid}} {{json .NetworkSettings.Networks}}", "box").stdout
    assert after == before
    wait_inside(m1, "here", " 0% packet loss", "ping", "-c", "1", "-W", "1", "box")
    w1.docker("rm", "-f", "box")
    wait_until(lambda: len(attachments(m1)) == 1, "the place is given back")


@pytest.mark.slow
def test_a_crash_of_the_machine_frees_the_endpoint_and_the_policy_restarts_the_container(
    cluster: TestCluster, m1: TestNode, w1: TestNode
) -> None:
    m1.docker("network", "create", "-d", "overlay", "--attachable", "net1")
    run(w1, "box", "--network", "net1", "--restart", "always")
    run(w1, "gone", "--network", "net1")
    cluster.skep("kill", "w1")
    cluster.skep("start", "w1")
    wait_until(
        lambda: "box" in w1.docker("ps", "--format", "{{.Names}}", check=False).stdout, "it runs again"
    )
    assert w1.docker("ps", "--format", "{{.Names}}").stdout.split() == ["box"]
    wait_until(lambda: len(attachments(m1)) == 1, "places of ended containers are given back")
    run(m1, "here", "--network", "net1")
    wait_inside(m1, "here", " 0% packet loss", "ping", "-c", "1", "-W", "1", "box")


def test_on_a_bridge_network_containers_have_names_and_the_world_and_no_other_network(m1: TestNode) -> None:
    m1.docker("network", "create", "--subnet", "172.30.5.0/24", "front")
    m1.docker("network", "create", "back")
    web = run(m1, "web", "--network", "front", "--network-alias", "www", "--ip", "172.30.5.9", command=SERVE)
    run(m1, "one", "--network", "front")
    run(m1, "two", "--network", "back")
    run(m1, "three")
    for name in ("web", "www", web[:12], "web.front"):
        wait_inside(m1, "one", " 0% packet loss", "ping", "-c", "1", "-W", "2", name)
    assert inside(m1, "two", "nslookup", "web.") == ""
    ways = json.loads(m1.docker("inspect", "web", "--format", "{{json .NetworkSettings}}").stdout)
    assert ways["Networks"]["front"]["IPAddress"] == "172.30.5.9"
    shown = m1.docker("exec", "web", "ip", "-4", "-o", "addr").stdout
    outward = next(line.split()[3].partition("/")[0] for line in shown.splitlines() if "eth1" in line)
    for stranger in ("two", "three"):
        for address in ("172.30.5.9", outward):
            assert inside(m1, stranger, "ping", "-c", "1", "-W", "1", address) == ""
    gateway = m1.docker(
        "network", "inspect", "-f", "{{(index .IPAM.Config 0).Gateway}}", "bridge"
    ).stdout.strip()
    wait_inside(m1, "one", " 0% packet loss", "ping", "-c", "1", "-W", "2", gateway)
    (front,) = json.loads(m1.docker("network", "inspect", "front").stdout)
    assert sorted(one["Name"] for one in front["Containers"].values()) == ["one", "web"]
    assert "has active endpoints (container" in refused(m1, "network", "rm", "front")
    m1.docker("rm", "-f", "web", "one")
    m1.docker("network", "rm", "front")


@pytest.mark.slow
def test_an_internal_network_leads_nowhere(m1: TestNode) -> None:
    m1.docker("network", "create", "--internal", "closed")
    run(m1, "one", "--network", "closed")
    run(m1, "two", "--network", "closed")
    wait_inside(m1, "one", " 0% packet loss", "ping", "-c", "1", "-W", "2", "two")
    assert "default" not in m1.docker("exec", "one", "ip", "route").stdout


@pytest.mark.slow
def test_bridge_none_and_host_are_what_they_are_in_docker(m1: TestNode) -> None:
    run(m1, "one")
    run(m1, "two")
    address = m1.docker("inspect", "-f", "{{.NetworkSettings.IPAddress}}", "two").stdout.strip()
    wait_inside(m1, "one", " 0% packet loss", "ping", "-c", "1", "-W", "2", address)
    assert inside(m1, "one", "ping", "-c", "1", "-W", "1", "two") == ""  # no names there
    links = ("run", "--rm", *LABEL, "--network", "none", IMAGE, "ip", "-o", "link")
    assert len(m1.docker(*links).stdout.splitlines()) == 1
    seen = m1.docker("run", "--rm", *LABEL, "--network", "host", IMAGE, "ip", "-o", "link").stdout
    assert "skep-gw" in seen


def test_a_port_is_published_by_ipv6_too(m1: TestNode) -> None:
    """As docker-proxy does it: without an address on both, by TCP and UDP; ``[::1]`` there alone."""
    netns = m1.description["netns"]
    serve = "echo hello > /a; exec httpd -f -p 80 -h /"
    run(m1, "web", "-p", "8088:80", "-p", "[::1]:8089:80", "-p", "8090:53/udp", command=("sh", "-c", serve))

    def fetched(address: str, port: int) -> str:
        try:
            return in_namespace(netns, fetch_page, address, port)
        except OSError as error:
            return type(error).__name__

    wait_until(lambda: fetched("127.0.0.1", 8088) == "hello\n", "the port answers")
    assert (fetched("::1", 8088), fetched("::1", 8089)) == ("hello\n", "hello\n")
    assert fetched("127.0.0.1", 8089) == "ConnectionRefusedError"
    pid = m1.client().api.inspect_container("web")["State"]["Pid"]
    with in_namespace(f"/proc/{pid}/ns/net", bound, 53) as server:
        server.settimeout(5)
        with in_namespace(netns, socket.socket, socket.AF_INET6, socket.SOCK_DGRAM) as client:
            client.settimeout(5)
            client.sendto(b"over ipv6", ("::1", 8090))
            said, peer = server.recvfrom(100)
            server.sendto(said.upper(), peer)
            assert client.recv(100) == b"OVER IPV6"
    # Clients before 23 write no brackets.
    lines = sorted(
        re.sub(r"> (:\S*):", r"> [\1]:", line) for line in m1.docker("port", "web").stdout.splitlines()
    )
    assert lines == [
        "53/udp -> 0.0.0.0:8090",
        "53/udp -> [::]:8090",
        "80/tcp -> 0.0.0.0:8088",
        "80/tcp -> [::1]:8089",
        "80/tcp -> [::]:8088",
    ]
    shown = m1.client().api.inspect_container("web")
    own = [{"HostIp": "", "HostPort": "8088"}, {"HostIp": "::1", "HostPort": "8089"}]
    assert shown["HostConfig"]["PortBindings"]["80/tcp"] == own
    taken = m1.docker("run", "-d", "--name", "late", *LABEL, "-p", "[::]:8088:80", IMAGE, *IDLE, check=False)
    assert "Bind for [::]:8088 failed: port is already allocated" in taken.stderr
    assert "invalid ip address" in refused(m1, "create", "-p", "[::1%lo]:80:80", IMAGE).lower()
    said = refused(m1, "create", "-p", "[::1]:80:80/sctp", IMAGE)
    assert "--publish of 80/sctp on an address of IPv6" in said
    m1.docker("rm", "-f", "web")
    m1.docker("start", "late")
    assert fetched("::1", 8088) == "ConnectionResetError", "nothing listens in the container"


def fetch_page(address: str, port: int) -> str:
    with socket.create_connection((address, port), timeout=5) as connection:
        connection.sendall(b"GET /a HTTP/1.0\r\n\r\n")
        return connection.makefile("rb").read().partition(b"\r\n\r\n")[2].decode()


def bound(port: int) -> socket.socket:
    opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    opened.bind(("0.0.0.0", port))
    return opened


@pytest.mark.slow
def test_a_published_port_is_the_nodes_and_free_when_the_container_has_ended(m1: TestNode) -> None:
    fetch = ("run", "--rm", *LABEL, "--network", "host", IMAGE, "wget", "-qO-", "http://127.0.0.1:8088/a")
    serve = ("sh", "-c", "mkdir -p /w; echo hello > /w/a; exec httpd -f -p 80 -h /w")
    m1.docker("network", "create", "front")
    run(m1, "web", "--network", "front", "-p", "8088:80", command=serve)
    wait_until(lambda: m1.docker(*fetch, check=False).stdout == "hello\n", "the port answers")
    assert m1.docker("port", "web").stdout.startswith("80/tcp -> 0.0.0.0:8088")
    taken = m1.docker("run", "-d", "--name", "late", *LABEL, "-p", "8088:80", IMAGE, *IDLE, check=False)
    assert "port is already allocated" in taken.stderr
    m1.docker("rm", "-f", "web")
    m1.docker("start", "late")


@pytest.mark.slow
def test_networks_are_joined_and_left_by_a_running_container(m1: TestNode, w1: TestNode) -> None:
    m1.docker("network", "create", "-d", "overlay", "--attachable", "net1")
    m1.docker("network", "create", "front")
    run(m1, "one", "--network", "front")
    run(m1, "two")
    run(w1, "far", "--network", "net1")
    m1.docker("network", "connect", "--alias", "deux", "front", "two")
    wait_inside(m1, "one", " 0% packet loss", "ping", "-c", "1", "-W", "2", "deux")
    assert "already exists in network front" in refused(m1, "network", "connect", "front", "two")
    m1.docker("network", "connect", "--alias", "un", "net1", "one")
    wait_inside(w1, "far", " 0% packet loss", "ping", "-c", "1", "-W", "1", "un")
    wait_inside(m1, "one", " 0% packet loss", "ping", "-c", "1", "-W", "1", "far")
    m1.docker("network", "disconnect", "net1", "one")
    assert inside(m1, "one", "ping", "-c", "1", "-W", "1", "far.net1") == ""
    wait_until(lambda: len(attachments(m1)) == 1, "the place is given back")
    m1.docker("network", "disconnect", "front", "two")
    assert inside(m1, "one", "ping", "-c", "1", "-W", "1", "deux") == ""
    assert "is not connected to" in refused(m1, "network", "disconnect", "front", "two")


@pytest.mark.slow
def test_what_docker_refuses_is_refused_in_its_words(m1: TestNode, w1: TestNode) -> None:
    m1.docker("network", "create", "-d", "overlay", "closed")
    for node in (m1, w1):
        said = refused(node, "run", "--rm", *LABEL, "--network", "closed", IMAGE, "true")
        assert "network closed not manually attachable" in said
        said = refused(node, "run", "--rm", *LABEL, "--network", "nosuch", IMAGE, "true")
        assert "network nosuch not found" in said
        assert node.docker("ps", "-aq", "--filter", "label=plain").stdout == ""
    run(m1, "box")
    said = refused(m1, "create", "--name", "box", IMAGE)
    assert 'Conflict. The container name "/box" is already in use by container' in said
    assert 'cannot remove container "box": container is running: stop' in refused(m1, "rm", "box")
    said = refused(m1, "create", "--pull", "never", "nosuch:1")
    assert "No such image: nosuch:1" in said
    assert "unknown or invalid runtime name: kata" in refused(m1, "create", "--runtime=kata", IMAGE)
    for option in (
        "--storage-opt=size=1G",
        "--domainname=example.com",
    ):
        said = refused(m1, "create", option, IMAGE)
        assert option.partition("=")[0] in said
    lacking = m1.docker("run", "--rm", *LABEL, IMAGE, "/nosuch", check=False)
    assert (
        lacking.returncode,
        m1.docker("ps", "-aq", "--filter", "label=plain", "--filter", "name=nosuch").stdout,
    ) == (
        127,
        "",
    )


def test_what_a_container_is_given_of_the_machine_is_shown_as_it_was_asked_for(m1: TestNode) -> None:
    options = ("--privileged", "--device=/dev/zero:/dev/mine:r", "--device-cgroup-rule=c 1:* r", "--pid=host")
    options += ("--ipc=shareable", "--uts=host", "--userns=host", "--cgroupns=private", "--cpu-shares=512")
    options += (
        "--cpuset-cpus=0",
        "--memory=64m",
        "--memory-swap=96m",
        "--memory-swappiness=7",
        "--pids-limit=50",
    )
    options += ("--cgroup-parent=mine",)
    annotations = (
        {"a": "b"} if "--annotation" in m1.docker("run", "--help").stdout else {}
    )  # clients since 24
    options += tuple(f"--annotation={name}={value}" for name, value in annotations.items())
    m1.docker("run", "-d", "--name", "box", *LABEL, *options, IMAGE, "sleep", "1000")
    host = m1.client().api.inspect_container("box")["HostConfig"]
    shown = {
        "Privileged": True,
        "Devices": [{"PathOnHost": "/dev/zero", "PathInContainer": "/dev/mine", "CgroupPermissions": "r"}],
        "DeviceCgroupRules": ["c 1:* r"],
        "PidMode": "host",
        "IpcMode": "shareable",
        "UTSMode": "host",
        "UsernsMode": "host",
        "CgroupnsMode": "private",
        "CpuShares": 512,
        "CpusetCpus": "0",
        "Memory": 64 << 20,
        "MemorySwap": 96 << 20,
        "MemorySwappiness": 7,
        "PidsLimit": 50,
        "Annotations": annotations or None,
        "CgroupParent": "mine",
        "MaskedPaths": None,
    }
    assert {name: host.get(name) for name in shown} == shown
    # Clients 25 and 26 drop --device-read-bps (https://github.com/docker/cli/issues/5321).
    client = m1.client().api
    rates = [{"Path": "/dev/loop0", "Rate": 1 << 20}]
    made = client.create_container(
        IMAGE, labels=["plain"], host_config=client.create_host_config(device_read_bps=rates)
    )
    assert client.inspect_container(made["Id"])["HostConfig"]["BlkioDeviceReadBps"] == rates
    within = (
        "run",
        "--rm",
        *LABEL,
        "--cgroupns=host",
        "--cgroup-parent=mine",
        IMAGE,
        "cat",
        "/proc/self/cgroup",
    )
    assert "-m1/mine/" in m1.docker(*within).stdout
    assert "invalid cgroup parent ../mine" in refused(m1, "create", "--cgroup-parent=../mine", IMAGE)
    m1.docker(
        "run",
        "-d",
        "--name",
        "guest",
        *LABEL,
        "--network=container:box",
        "--ipc=container:box",
        IMAGE,
        "sleep",
        "9",
    )
    guest = m1.client().api.inspect_container("guest")
    id = m1.docker("inspect", "--format", "{{.Id}}", "box").stdout.strip()
    assert (guest["HostConfig"]["NetworkMode"], guest["HostConfig"]["IpcMode"]) == (f"container:{id}",) * 2
    assert guest["NetworkSettings"]["Networks"] == {}
    assert m1.docker("ps", "--format", "{{.Names}} {{.Networks}}").stdout.count("guest") == 1
    m1.docker("network", "create", "side")
    said = refused(m1, "network", "connect", "side", "guest")
    assert "container sharing network namespace with another container or host" in said


@pytest.mark.slow
def test_security_options_hold_or_are_refused_in_dockers_words(m1: TestNode, tmp_path: Path) -> None:
    def confined_by(*options: str, command: tuple[str, ...]) -> str:
        chosen = (word for option in options for word in ("--security-opt", option))
        return m1.docker("run", "--rm", *LABEL, *chosen, IMAGE, *command, check=False).stderr

    def fails(test: str) -> tuple[str, ...]:
        return ("sh", "-c", f"[ {test} ] || echo other >&2")

    seccomp = "$(grep Seccomp: /proc/self/status | tr -dc 0-9)"
    privileges = "$(grep NoNewPrivs /proc/self/status | tr -dc 0-9)"
    assert not confined_by(command=fails(f"{seccomp}{privileges} = 20"))
    assert not confined_by("seccomp=unconfined", command=fails(f"{seccomp} = 0"))
    assert not confined_by("no-new-privileges", command=fails(f"{privileges} = 1"))
    profile = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}],
    }
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    said = confined_by(f"seccomp={tmp_path}/profile.json", command=("mkdir", "/x"))
    assert "Operation not permitted" in said
    hidden = "$(grep -c ' /proc/sys ' /proc/mounts)"
    assert not confined_by(command=fails(f"{hidden} = 1"))
    assert not confined_by("systempaths=unconfined", command=fails(f"{hidden} = 0"))

    options = ["label=disable", "apparmor=unconfined", "no-new-privileges=true"]
    run(m1, "box", *(word for option in options for word in ("--security-opt", option)))
    shown = m1.docker("inspect", "-f", "{{json .HostConfig.SecurityOpt}}", "box").stdout
    assert json.loads(shown) == options
    for option, reason in (
        ("selinux=off", 'invalid --security-opt 2: "selinux=off"'),
        ("label=level:s0", "do not support --security-opt label"),
        ("apparmor=nosuch", "apparmor" if apparmor.is_supported() else "no profile nosuch"),
    ):
        assert reason in refused(m1, "run", "--rm", *LABEL, "--security-opt", option, IMAGE)


@pytest.mark.slow
def test_a_restart_policy_starts_what_failed_and_not_what_its_user_stopped(
    m1: TestNode, tmp_path: Path
) -> None:
    run(m1, "flaky", "--restart", "on-failure:2", command=("sh", "-c", "exit 3"))
    state = ("inspect", "-f", "{{.RestartCount}} {{.State.Running}} {{.State.ExitCode}}", "flaky")
    wait_until(lambda: m1.docker(*state).stdout == "2 false 3\n", "it was tried twice more")
    run(m1, "steady", "--restart", "always")
    before = m1.docker("inspect", "-f", "{{.State.Pid}}", "steady").stdout
    os.kill(int(before), 9)
    running = ("inspect", "-f", "{{.State.Running}} {{.State.Pid}}", "steady")
    wait_until(lambda: "true" in (now := m1.docker(*running).stdout) and before not in now, "it runs again")
    m1.docker("stop", "steady")
    m1.docker("rename", "steady", "still")
    assert m1.docker("inspect", "-f", "{{.State.Running}}", "still").stdout == "false\n"
    m1.docker("start", "still")
    m1.docker("restart", "-t", "1", "still")
    assert m1.docker("inspect", "-f", "{{.State.Running}}", "still").stdout == "true\n"
    run(m1, "looping", "--restart", "always", command=("sh", "-c", "exit 3"))
    states = ("ps", "-a", "--filter", "name=looping", "--format", "{{.State}} {{.Status}}")
    wait_until(lambda: m1.docker(*states).stdout.startswith("restarting Restarting (3) "), "it is shown")
    m1.docker("container", "prune", "-f")
    assert 'cannot remove container "looping": container is r' in refused(m1, "rm", "looping")
    m1.docker("kill", "looping")
    wait_until(lambda: m1.docker(*states).stdout.startswith("exited "), "nothing starts it any more")


@pytest.mark.slow
def test_files_of_the_node_and_volumes_are_mounted_and_nameless_ones_go(m1: TestNode, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("from the node\n")
    shown = m1.docker(
        "run",
        "--rm",
        *LABEL,
        "-v",
        f"{tmp_path}:/in:ro",
        "-v",
        "kept:/out",
        "-v",
        "/none",
        IMAGE,
        "sh",
        "-c",
        "cat /in/a; touch /out/x; touch /in/b || echo read-only",
    ).stdout
    assert shown == "from the node\nread-only\n"
    assert m1.docker("volume", "ls", "-q").stdout.split() == ["kept"]
    m1.docker("volume", "rm", "kept")


def test_nothing_is_left_of_containers_that_are_gone(m1: TestNode) -> None:
    process = Path(f"/proc/{m1.pids('skep-node')[0]}")

    def left() -> list[str]:
        places = [process / "root/run/skep" / name for name in ("netns", "overlays", "tables", "names")]
        links = [line.split(":")[0].strip() for line in (process / "net/dev").read_text().splitlines()]
        files = [path.name for place in places if place.is_dir() for path in place.iterdir()]
        return sorted([*files, *(link for link in links if link.startswith(("vs", "vx")))])

    before = set(left())  # with what the tests before this one leave for a moment
    m1.docker("network", "create", "-d", "overlay", "--attachable", "net1")
    m1.docker("network", "create", "front")
    for network in ("net1", "front", "bridge"):
        run(m1, f"box-{network}", "--network", network, "-p", "80")
    assert len(set(left()) - before) > 5
    for network in ("net1", "front", "bridge"):
        m1.docker("rm", "-f", f"box-{network}")
    wait_until(lambda: not attachments(m1), "the place is given back")
    wait_until(lambda: before.issuperset(left()), "namespaces, tables and links are gone")
    m1.docker("network", "rm", "net1", "front")


@pytest.mark.slow
def test_bridge_networks_outlive_the_daemon_with_their_names(m1: TestNode) -> None:
    m1.docker("network", "create", "front")
    run(m1, "one", "--network", "front")
    run(m1, "two", "--network", "front", "-p", "8089:80")
    restart_daemon(m1)
    wait_inside(m1, "one", " 0% packet loss", "ping", "-c", "1", "-W", "2", "two")
    run(m1, "three", "--network", "front")
    wait_inside(m1, "one", " 0% packet loss", "ping", "-c", "1", "-W", "2", "three")
    m1.docker("rename", "three", "drei")
    wait_inside(m1, "one", " 0% packet loss", "ping", "-c", "1", "-W", "2", "drei")


@pytest.mark.slow
def test_a_node_that_leaves_releases_endpoints_and_its_containers_run_on(m1: TestNode, w1: TestNode) -> None:
    """The last of this module: the worker is in no swarm any more."""
    m1.docker("network", "create", "-d", "overlay", "--attachable", "net1")
    m1.docker("run", "-d", "--name", "keeper", *LABEL, "--network", "net1", IMAGE, *IDLE)
    box = run(w1, "box", "--network", "net1")
    w1.docker("swarm", "leave")
    assert w1.docker("ps", "-q", "--no-trunc").stdout.split() == [box]
    assert w1.docker("inspect", "-f", "{{json .NetworkSettings.Networks}}", "box").stdout == "{}\n"
    said = refused(w1, "run", "--rm", *LABEL, "--network", "net1", IMAGE, "true")
    assert "network net1 not found" in said
    w1.docker("network", "create", "front")
    run(w1, "one", "--network", "front")
    run(w1, "two", "--network", "front")
    wait_inside(w1, "one", " 0% packet loss", "ping", "-c", "1", "-W", "2", "two")
    run(w1, "three")


def test_what_takes_room_is_counted_and_a_name_leads_to_the_node(m1: TestNode) -> None:
    """``docker system df``, and ``host-gateway`` by effect."""

    def usage() -> dict[str, dict[str, str]]:
        lines = m1.docker("system", "df", "--format", "{{json .}}").stdout.splitlines()
        return {one["Type"]: one for one in map(json.loads, lines)}

    def added(kind: str, field: str) -> int:
        return int(after[kind][field]) - int(before[kind][field])

    before = usage()
    run(m1, "full", "-v", "/data", "--add-host", "gate:host-gateway")
    try:
        inside(
            m1,
            "full",
            "sh",
            "-c",
            "head -c 3000000 /dev/zero >/root/here; head -c 5000000 /dev/zero >/data/there",
        )
        after = usage()
        assert (added("Containers", "Active"), added("Containers", "TotalCount")) == (1, 1)
        assert (added("Local Volumes", "Active"), added("Local Volumes", "TotalCount")) == (1, 1)
        in_detail = json.loads(m1.docker("system", "df", "-v", "--format", "{{json .}}").stdout)
        assert {one["Size"] for one in in_detail["Containers"] if one["Names"] == "full"} == {"3MB"}
        volume = m1.docker("inspect", "-f", "{{(index .Mounts 0).Name}}", "full").stdout.strip()
        assert {one["Size"] for one in in_detail["Volumes"] if one["Name"] == volume} == {"5MB"}
        assert after["Images"]["Active"] != "0"
        assert after["Build Cache"]["Size"] == "0B"
        (gateway,) = (
            line.split()[0] for line in inside(m1, "full", "cat", "/etc/hosts").splitlines() if "gate" in line
        )
        (address,) = m1.docker("inspect", "-f", "{{.NetworkSettings.Gateway}}", "full").stdout.split()
        assert gateway == address
        assert " 0% packet loss" in inside(m1, "full", "ping", "-c", "1", "-W", "2", "gate")
    finally:
        m1.docker("rm", "-f", "-v", "full", check=False)


@pytest.mark.parametrize("cli", CLIS)
def test_volumes_are_made_and_pruned_and_the_system_is(w1: TestNode, cli: str) -> None:
    """As nightly jobs do it: what is in use stays, with its content."""
    assert w1.docker("volume", "create", "--label", "a=b", "kept", cli=cli).stdout == "kept\n"
    w1.docker("volume", "create", "spare", cli=cli)
    nameless = w1.docker("volume", "create", cli=cli).stdout.strip()
    try:
        run(w1, "keeper", "-v", "kept:/v", command=("sh", "-c", "echo here > /v/file; exec sleep 600"))
        wait_until(lambda: inside(w1, "keeper", "cat", "/v/file") == "here\n", "the file is written")
        pruned = w1.docker("volume", "prune", "-af", cli=cli, check=False)
        if pruned.returncode:  # a client before --all prunes them anyway
            assert "unknown" in pruned.stderr
            pruned = w1.docker("volume", "prune", "-f", cli=cli)
        assert {"spare", nameless} <= set(pruned.stdout.split())
        assert "Total reclaimed space" in pruned.stdout
        assert w1.docker("volume", "ls", "-q", "--filter", "label=a=b", cli=cli).stdout == "kept\n"
        assert "Total reclaimed space" in w1.docker("system", "prune", "-f", cli=cli).stdout
        assert inside(w1, "keeper", "cat", "/v/file") == "here\n"
    finally:
        w1.docker("rm", "-f", "keeper", check=False)
        w1.docker("volume", "rm", "-f", "kept", "spare", nameless, check=False)
    assert 'plugin "nosuch" not found' in refused(w1, "volume", "create", "-d", "nosuch", "data")
    assert 'missing required option: "device"' in refused(w1, "volume", "create", "-o", "type=tmpfs", "x")
