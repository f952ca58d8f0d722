"""A node of an ordinary user: the docker command on it, and its place in a cluster of root's nodes."""

import asyncio
import io
import json
import signal
import subprocess
import tarfile
from collections.abc import Iterator

import pytest

from skep.playground import names, underlay
from tests.support.machines.playground_rig import (
    CLIS,
    IDLE,
    IMAGE,
    SKEP,
    TestCluster,
    TestNode,
    a_playground,
    remove_services,
    wait_until,
)
from tests.support.machines.rootless_user import RootlessNode, a_rootless_node

pytestmark = [
    pytest.mark.needs("rootlesskit", "slirp4netns", "newuidmap", "useradd"),
    pytest.mark.timeout(240),
    pytest.mark.slow,
]

HOST = 30
ADDRESS = names.UnderlayAddress(subnet=0, host=HOST).ip
WEB = ("sh", "-c", "echo hello > /index.html; exec httpd -f -p 80 -h /")


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    with a_playground("less", workers=1) as cluster:
        yield cluster


def saved_image(cluster: TestCluster) -> bytes:
    command = [CLIS[-1], "--host", cluster.node("m1").socket, "save", IMAGE]
    return subprocess.run(command, capture_output=True, check=True, timeout=60).stdout


@pytest.fixture(scope="module")
def stopped(cluster: TestCluster) -> Iterator[RootlessNode]:
    """The node of a user whose machine is a neighbor of the cluster's nodes."""
    place = underlay.attach(cluster.name, "r1", names.UnderlayAddress(subnet=0, host=HOST))
    asyncio.run(place)
    netns = f"/run/netns/{names.namespace(cluster.name, 'r1')}"
    with a_rootless_node("skep-test-user", netns) as node:
        yield node


@pytest.fixture(scope="module")
def r1(cluster: TestCluster, stopped: RootlessNode) -> RootlessNode:
    """The running node, with the image of the tests."""
    stopped.start()
    stopped.docker("load", stdin=saved_image(cluster))
    return stopped


@pytest.fixture(scope="module")
def joined(cluster: TestCluster, r1: RootlessNode) -> RootlessNode:
    m1 = cluster.node("m1")
    token = m1.docker("swarm", "join-token", "--quiet", "worker").stdout.strip()
    r1.docker("swarm", "join", "--token", token, f"{m1.description['addr']}:2377")
    return r1


@pytest.fixture
def m1(cluster: TestCluster, joined: RootlessNode) -> Iterator[TestNode]:
    node = cluster.node("m1")
    yield node
    remove_services(node)


def fetched(cluster: TestCluster, port: int, address: str = ADDRESS) -> str:
    """The web page at a port of the user's machine, as m1 sees it.  Empty if it refuses."""
    netns = cluster.node("m1").description["netns"]
    url = f"http://{address}:{port}/"
    command = ["nsenter", f"--net={netns}", "curl", "--silent", "--max-time", "5", url]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def refuses(cluster: TestCluster, port: int) -> bool:
    """Whether the user's machine refuses a connection at once, instead of accepting and never answering it."""
    command = ["nsenter", f"--net={cluster.node('m1').description['netns']}", "curl", "--silent"]
    done = subprocess.run(
        [*command, f"http://{ADDRESS}:{port}/"], capture_output=True, timeout=60, check=False
    )
    return done.returncode == 7  # curl(1): failed to connect


def skep(node: TestNode, *words: str) -> str:
    command = [SKEP, "--host", node.socket, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr


def refused(node: RootlessNode, *words: str) -> str:
    done = node.docker(*words, check=False)
    assert done.returncode != 0, done.stdout
    return done.stderr


# --- the user's node alone ------------------------------------------------------------------------------------------


def test_what_is_missing_is_said_before_anything_starts(stopped: RootlessNode) -> None:
    command = stopped.daemon(hides_devices=True, XDG_RUNTIME_DIR="")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert "as root, chmod 666 /dev/net/tun" in first
    assert "XDG_RUNTIME_DIR is not set" in second


def test_info_says_that_it_is_rootless_and_has_no_limits(r1: RootlessNode) -> None:
    info = json.loads(r1.docker("info", "--format", "{{json .}}").stdout)
    assert "name=rootless" in info["SecurityOptions"]
    assert not info["LiveRestoreEnabled"]
    assert info["DockerRootDir"].endswith("/.local/share/skep")
    if info["CgroupDriver"] == "none":  # this machine delegates no control groups
        assert any("Running in rootless-mode without cgroups" in one for one in info["Warnings"])
        assert not info["MemoryLimit"]
        assert not info["PidsLimit"]
        ran = r1.docker("run", "--rm", "--memory", "64m", IMAGE, "true")
        assert "Your kernel does not support memory limit capabilities. Limitation discarded." in ran.stderr


def test_the_docker_command_works_on_it(r1: RootlessNode) -> None:
    r1.docker("run", "--detach", "--name", "box", "--volume", "data:/data", IMAGE, *IDLE)
    assert r1.docker("exec", "box", "id", "-u").stdout == "0\n"
    assert "0 0 0" not in r1.docker("exec", "box", "cat", "/proc/self/uid_map").stdout
    r1.docker("exec", "box", "sh", "-c", "echo kept > /data/file; chown 1000:1000 /data/file")
    assert (
        r1.docker("run", "--rm", "--volume", "data:/d", IMAGE, "stat", "-c", "%u", "/d/file").stdout
        == "1000\n"
    )
    r1.docker("cp", "box:/data/file", "-")
    assert "sleep" in r1.docker("top", "box").stdout
    assert "cgroups not configured" in refused(r1, "pause", "box")
    r1.docker("run", "--name", "said", IMAGE, "echo", "hello")
    assert r1.docker("logs", "said").stdout == "hello\n"
    r1.docker("rm", "--force", "box", "said")
    r1.docker("volume", "rm", "data")


def test_a_directory_that_a_build_replaces_hides_the_layers_below(r1: RootlessNode) -> None:
    content = b"FROM busybox:1\nRUN mkdir /a && touch /a/old\nRUN rm -r /a && mkdir /a && touch /a/new\n"
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as tar:
        dockerfile = tarfile.TarInfo("Dockerfile")
        dockerfile.size = len(content)
        tar.addfile(dockerfile, io.BytesIO(content))
    r1.docker("build", "--tag", "layered", "-", stdin=context.getvalue())
    assert r1.docker("run", "--rm", "layered", "ls", "/a").stdout == "new\n"
    r1.docker("rmi", "layered")


def test_published_ports_are_ports_of_the_users_machine(cluster: TestCluster, r1: RootlessNode) -> None:
    r1.docker("run", "--detach", "--name", "web", "--publish", "18080:80", IMAGE, *WEB)
    wait_until(lambda: fetched(cluster, 18080) == "hello", "the page is served")
    assert "port is already allocated" in refused(r1, "run", "--publish", "18080:80", IMAGE, "true")
    assert "cannot expose privileged port 80" in refused(r1, "run", "--publish", "80:80", IMAGE, "true")
    assert "use 127.0.0.1, or all addresses" in refused(
        r1, "run", "--publish", f"{ADDRESS}:90:80", IMAGE, "true"
    )
    netns = f"/run/netns/{names.namespace(cluster.name, 'r1')}"
    server = ["nsenter", f"--net={netns}", "busybox", "nc", "-l", "-p", "18081"]
    with subprocess.Popen(server) as other:
        try:
            wait_until(
                lambda: (
                    "already allocated"
                    in r1.docker("run", "-d", "-p", "18081:80", IMAGE, "true", check=False).stderr
                ),
                "a port of another program of the machine is refused",
            )
        finally:
            other.kill()
    r1.docker("rm", "--force", "web")
    assert fetched(cluster, 18080) == ""


def test_ports_outlive_a_crash_of_the_process_that_holds_them(cluster: TestCluster, r1: RootlessNode) -> None:
    r1.docker("run", "--detach", "--name", "web", "--publish", "18082:80", IMAGE, *WEB)
    wait_until(lambda: fetched(cluster, 18082) == "hello", "the page is served")
    # A port that the process did not close before it crashed.
    control = ["rootlessctl", f"--socket={r1.runtime_dir}/skep-rootless/api.sock"]
    subprocess.run([*control, "add-ports", "0.0.0.0:18083:18082/tcp"], capture_output=True, check=True)
    (net,) = r1.pids("skep-net")
    subprocess.run(["kill", "-9", str(net)], check=True)
    wait_until(lambda: r1.pids("skep-net") not in ([], [net]), "there is another net process")
    wait_until(lambda: fetched(cluster, 18082) == "hello", "the page is served again")
    assert (
        "18083"
        not in subprocess.run([*control, "list-ports"], capture_output=True, text=True, check=True).stdout
    )
    r1.docker("rm", "--force", "web")
    wait_until(lambda: fetched(cluster, 18082) == "", "its port is closed")


def test_containers_are_stopped_with_the_node_and_restarted_with_it(r1: RootlessNode) -> None:
    r1.docker(
        "run",
        "--detach",
        "--name",
        "ends",
        IMAGE,
        "sh",
        "-c",
        "trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done",
    )
    wait_until(lambda: "ready" in r1.docker("logs", "ends").stdout, "it handles the signal")
    r1.docker("run", "--detach", "--name", "stays", "--restart", "always", IMAGE, *IDLE)
    r1.end()
    r1.start()
    assert r1.docker("inspect", "--format", "{{.State.ExitCode}}", "ends").stdout == "7\n"

    def is_running() -> bool:
        return r1.docker("inspect", "--format", "{{.State.Running}}", "stays").stdout == "true\n"

    wait_until(is_running, "the container with a restart policy runs again")
    r1.end(signal.SIGKILL)
    r1.start()
    wait_until(is_running, "it runs again after a crash")
    r1.docker("rm", "--force", "ends", "stays")


def test_it_does_not_found_a_cluster(r1: RootlessNode) -> None:
    assert "a rootless node cannot manage a cluster" in refused(r1, "swarm", "init")


def test_delegated_control_groups_freeze_and_limit(cluster: TestCluster) -> None:
    with a_rootless_node("skep-test-able", is_delegated=True) as node:
        node.start()
        node.docker("load", stdin=saved_image(cluster))
        info = json.loads(node.docker("info", "--format", "{{json .}}").stdout)
        assert (info["CgroupDriver"], info["CgroupVersion"]) == ("cgroupfs", "2")
        node.docker("run", "--detach", "--name", "box", "--memory", "64m", IMAGE, *IDLE)
        node.docker("pause", "box")
        assert "(Paused)" in node.docker("ps", "--format", "{{.Status}}").stdout
        node.docker("unpause", "box")
        if info["MemoryLimit"]:  # a hybrid machine has this controller in another hierarchy
            assert node.docker("exec", "box", "cat", "/sys/fs/cgroup/memory.max").stdout == f"{64 << 20}\n"


# --- in a cluster ---------------------------------------------------------------------------------------------------

RUN_THERE = ("--detach", "--constraint", "node.facts.rootless == true")


def error_of(m1: TestNode, service: str) -> str:
    lines = m1.docker("service", "ps", "--no-trunc", "--format", "{{.Error}}", service).stdout.splitlines()
    return lines[0] if lines else ""


def test_tasks_without_overlays_run_with_their_ports_and_logs(cluster: TestCluster, m1: TestNode) -> None:
    publish = "mode=host,published=18200,target=80"
    m1.docker("service", "create", *RUN_THERE, "--name", "web", "--publish", publish, IMAGE, *WEB)
    wait_until(lambda: fetched(cluster, 18200) == "hello", "the task's page is served by the user's machine")
    m1.docker("service", "create", *RUN_THERE, "--name", "said", IMAGE, "sh", "-c", f"echo said; {IDLE[2]}")
    wait_until(lambda: "said" in m1.docker("service", "logs", "said").stdout, "the manager shows its logs")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--publish", "18201:80"), "overlay network ingress"),
        (("--network", "meshed"), "overlay network meshed"),
        (("--limit-memory", "64m"), "limits of memory"),
        (("--network", "host"), "host network"),
        (("--publish", "mode=host,published=81,target=80"), "port 81, which is below 1024"),
    ],
)
def test_what_it_cannot_do_is_not_placed_there_and_explained(
    m1: TestNode, options: tuple[str, ...], why: str
) -> None:
    if "meshed" in options and "meshed" not in m1.docker("network", "ls").stdout:
        m1.docker("network", "create", "--driver", "overlay", "meshed")
    m1.docker("service", "create", *RUN_THERE, "--name", "refused", *options, IMAGE, *IDLE)
    wait_until(lambda: "not possible on 1 node in rootless mode" in error_of(m1, "refused"), "it waits")
    explained = skep(m1, "explain", "refused.1")
    assert f"not possible in rootless mode: {why}" in explained


def test_it_serves_no_ports_of_the_routing_mesh(cluster: TestCluster, m1: TestNode) -> None:
    m1.docker("service", "create", "--detach", "--name", "web", "--publish", "18202:80", IMAGE, *WEB)
    addr = m1.description["addr"]
    wait_until(lambda: fetched(cluster, 18202, addr) == "hello", "the mesh serves the page")
    assert refuses(cluster, 18202)


def test_it_is_not_promoted_and_not_probed(m1: TestNode, joined: RootlessNode) -> None:
    id = joined.docker("info", "--format", "{{.Swarm.NodeID}}").stdout.strip()
    promoted = m1.docker("node", "promote", id, check=False)
    assert "is rootless and cannot manage a cluster" in promoted.stderr
    said = skep(m1, "doctor", "network")
    assert "no problems found" in said
    assert "Rootless nodes, which have no overlay networks:" in said
