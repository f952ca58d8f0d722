"""The Engine API in containers: a socket of their own, what it shows by default, and what gives more."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from tests.support.clients.raw_calls import Answered, call, connected, received
from tests.support.machines.playground_rig import (
    IDLE,
    IMAGE,
    TestCluster,
    TestNode,
    a_playground,
    container_pids,
    create,
    remove_services,
    wait_running,
    wait_until,
)

SOCKET = "/var/run/docker.sock"
MOUNT = ("--mount", f"type=bind,source={SOCKET},target={SOCKET}")
SECRET = "not-for-others"


@pytest.fixture(scope="module")
def two() -> Iterator[TestCluster]:
    with a_playground("apis", managers=1, workers=1) as playground:
        yield playground


@pytest.fixture
def m1(two: TestCluster) -> Iterator[TestNode]:
    node = two.node("m1")
    yield node
    remove_services(node)


def socket_in(node: TestNode, service: str, target: str = SOCKET) -> str:
    """The path by which this process reaches a socket that the service's container on ``node`` has mounted."""
    (pid,) = container_pids(node, service).values()
    return f"/proc/{pid}/root{target}"


def started(node: TestNode, name: str, *options: str, mount: tuple[str, ...] = MOUNT) -> str:
    """A service with the API's socket on the manager; the socket's path."""
    create(node, name, 1, "--constraint", "node.role==manager", *mount, *options)
    wait_running(node, name, 1)
    return socket_in(node, name)


def test_a_container_reads_the_cluster_and_changes_nothing(m1: TestNode) -> None:
    create(m1, "web", 1, "--env", f"PASSWORD={SECRET}", "--log-opt", f"env={SECRET}")
    m1.docker("config", "create", "settings", "-", stdin=SECRET)
    api = started(m1, "reader")
    wait_running(m1, "web", 1)
    (web,) = call(api, "GET /v1.41/services?filters=%7B%22name%22%3A%5B%22web%22%5D%7D").document
    assert web["Spec"]["TaskTemplate"]["ContainerSpec"]["Env"] == ["PASSWORD="]
    listed = ("/info", "/version", "/nodes", "/tasks", "/networks", "/volumes", "/images/json", "/swarm")
    for path in (*listed, "/containers/json", "/configs", "/secrets", f"/services/{web['ID']}"):
        shown = call(api, f"GET {path}")
        assert shown.status == 200, (path, shown)
        assert SECRET not in shown.text, path
        assert "SWMTKN-1" not in shown.text, path
    settings = m1.client().api.configs()[0]
    assert settings["Spec"]["Data"] not in call(api, f"GET /configs/{settings['ID']}").text
    (mine,) = m1.client().api.containers(filters={"label": "com.docker.swarm.service.name=reader"})
    assert mine["Mounts"][0]["Source"] == SOCKET, "shown as it was asked for"
    for request in (
        f"GET /services/{web['ID']}/logs?stdout=1",
        f"GET /containers/{mine['Id']}/archive?path=/etc",
        f"GET /containers/{mine['Id']}/export",
        f"GET /containers/{mine['Id']}/top?ps_args=e",
        f"POST /containers/{mine['Id']}/exec",
        f"DELETE /services/{web['ID']}",
        "POST /services/create",
        "POST /containers/create",
        "POST /swarm/leave?force=1",
        "GET /swarm/unlockkey",
        "GET /skep/backup",
        "GET /services/../swarm/unlockkey",
        f"GET /containers/{mine['Id']}/json%2f..%2fexport",
    ):
        refused = call(api, request)
        assert refused.status == 403, (request, refused)
        assert "limited to read access" in refused.document["message"]
    m1.docker("config", "rm", "settings")
    assert {one.name for one in m1.client().services.list()} == {"web", "reader"}


def test_what_follows_a_request_reaches_no_server(m1: TestNode) -> None:
    api = started(m1, "reader")
    leave = "POST /swarm/leave?force=true HTTP/1.1\r\nHost: d\r\nContent-Length: 0\r\n\r\n"
    for head in (
        "GET /nodes HTTP/1.1\r\nHost: d\r\n\r\n",
        "GET /_ping HTTP/1.1\r\nHost: d\r\nConnection: keep-alive\r\n\r\n",
        "GET /version HTTP/1.1\r\nHost: d\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n",
    ):
        with closing(connected(api)) as connection:
            connection.sendall((head + leave).encode())
            assert received(connection).status == 200
    with closing(connected(api)) as connection:
        hidden = f"GET /events HTTP/1.1\r\nHost: d\r\nContent-Length: {len(leave)}\r\n\r\n{leave}"
        connection.sendall(hidden.encode())
        assert received(connection).status == 400
    assert m1.client().api.info()["Swarm"]["LocalNodeState"] == "active"


def test_the_socket_outlives_the_node_process(two: TestCluster, m1: TestNode) -> None:
    api = started(m1, "reader")
    old = m1.pids("skep-node")
    m1.kill(old[0])
    wait_until(lambda: old[0] not in m1.pids("skep-node"), "the node process has ended")
    assert call(api, "GET /_ping").text == "OK", "asked while there was no node process: it waited"
    wait_until(lambda: m1.pids("skep-node") not in ([], old), "another node process")
    os.kill(m1.pids("skep-node")[0], signal.SIGTERM)
    wait_until(lambda: not m1.pids("skep-node"), "the node has stopped as planned")
    with closing(connected(api)) as waiting:
        waiting.sendall(b"GET /info HTTP/1.1\r\nHost: d\r\n\r\n")
        two.skep("start", "m1")
        assert received(waiting).status == 200
    assert call(api, "POST /swarm/leave?force=1").status == 403
    # A container's socket is that of its present start.
    name = m1.docker("run", "-d", "-v", f"{SOCKET}:{SOCKET}", IMAGE, *IDLE).stdout.strip()
    for _ in range(2):
        pid = m1.client().api.inspect_container(name)["State"]["Pid"]
        assert call(f"/proc/{pid}/root{SOCKET}", "GET /_ping").text == "OK"
        m1.docker("restart", "--time", "1", name)
    m1.docker("rm", "--force", name)


def test_more_is_given_by_a_label_that_the_cluster_allows(two: TestCluster, m1: TestNode) -> None:
    label = ("--container-label", "skep.api=full")
    refused = m1.docker("service", "create", "--detach", *MOUNT, *label, IMAGE, check=False)
    assert "this cluster does not allow services to use: api" in refused.stderr
    two.skep("exec", "m1", "--", str(skep_command()), "cluster", "allow", "api,api-inspect")
    try:
        full = started(m1, "agent", *label)
        inspecting = started(m1, "logs", "--container-label", "skep.api=inspect", "--env", f"A={SECRET}")
        asked = json.dumps({"Name": "made", "TaskTemplate": {"ContainerSpec": {"Image": IMAGE}}})
        assert call(inspecting, "POST /services/create", asked.encode()).status == 403
        assert SECRET in call(inspecting, "GET /services").text
        assert "SWMTKN-1" not in call(inspecting, "GET /swarm").text
        (id,) = container_pids(m1, "logs")
        assert call(inspecting, f"GET /containers/{id}/logs?stdout=1").status == 200
        assert "sleep" in call(inspecting, f"GET /containers/{id}/top?ps_args=aux").text
        assert call(inspecting, f"GET /containers/{id}/top?ps_args=eww").status == 403
        assert call(full, "POST /services/create", asked.encode()).status == 201
        assert "SWMTKN-1" in call(full, "GET /swarm").text
    finally:
        two.skep("exec", "m1", "--", str(skep_command()), "cluster", "allow", "none")


def test_a_plain_container_with_the_socket_may_do_what_root_may(m1: TestNode) -> None:
    """As those that remove what other tests have left: by label, with volumes and networks, and nothing else."""
    session = "session=s1"

    def box(name: str, *options: str) -> str:
        return m1.docker("run", "-d", "--name", name, *options, IMAGE, *IDLE).stdout.strip()

    reaper = box("reaper", "-v", f"{SOCKET}:{SOCKET}", "--network", "none")
    modest = box("modest", "-v", f"{SOCKET}:{SOCKET}:ro", "--label", "skep.api=read")
    around = box("around", "--mount", "type=bind,source=/,target=/host,readonly")
    m1.docker("network", "create", "--label", session, "n1")
    m1.docker("volume", "create", "--label", session, "v1")
    m1.docker("tag", IMAGE, "left:1")
    box("left", "--label", session, "--network", "n1", "-v", "v1:/v", "-v", "/anonymous")
    other = box("other", "--label", "session=s2")
    inspected = m1.client().api.inspect_container
    full = f"/proc/{inspected(reaper)['State']['Pid']}/root{SOCKET}"
    filters = f"%7B%22label%22:%5B%22{session}%22%5D%7D"
    try:
        (found,) = call(full, f"GET /containers/json?all=1&filters={filters}").document
        (anonymous,) = (one["Name"] for one in found["Mounts"] if one["Destination"] == "/anonymous")
        limited = f"/proc/{inspected(modest)['State']['Pid']}/root{SOCKET}"
        covered = f"/proc/{inspected(around)['State']['Pid']}/root/host/run/skep/skep.sock"
        for path in (limited, covered):
            assert call(path, f"DELETE /containers/{found['Id']}?force=1").status == 403
        assert call(full, f"DELETE /containers/{found['Id']}?force=1&v=1").status == 204
        assert call(full, f"DELETE /networks/{call(full, 'GET /networks/n1').document['Id']}").status == 204
        assert call(full, "DELETE /volumes/v1").status == 204
        assert call(full, f"GET /volumes/{anonymous}").status == 404
        assert call(full, "DELETE /images/left:1").status == 200
        (kept,) = call(full, "GET /containers/json?filters=%7B%22name%22:%5B%22other%22%5D%7D").document
        assert kept["Id"] == other
        assert "SWMTKN-1" in call(full, "GET /swarm").text, "on a manager of the cluster, too"
    finally:
        m1.docker("rm", "-f", "reaper", "modest", "around", "other", "left", check=False)


def skep_command() -> str:
    return os.path.join(os.path.dirname(sys.executable), "skep")


def test_a_mount_of_a_directory_is_no_other_way_in(m1: TestNode) -> None:
    started(m1, "watcher", mount=("--mount", "type=bind,source=/,target=/host,readonly"))
    (id,) = container_pids(m1, "watcher")
    ask = (
        "import socket,sys\n"
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
        "s.sendall((sys.argv[2] + ' HTTP/1.1\\r\\nHost: d\\r\\nConnection: close\\r\\n\\r\\n').encode())\n"
        "while d := s.recv(65536): sys.stdout.write(d.decode())\n"
    )

    def inside(path: str, request: str) -> Answered:
        words = ("chroot", "/host", sys.executable, "-c", ask, path, request)
        said = m1.docker("exec", id, *words).stdout
        head, _, body = said.replace("\r\n", "\n").partition("\n\n")
        return Answered(int(head.split()[1]), body)

    full = m1.docker(
        "run", "-d", "--label", "skep.api=full", "-v", f"{SOCKET}:{SOCKET}", IMAGE, *IDLE
    ).stdout.strip()
    theirs = f"/proc/{m1.client().api.inspect_container(full)['State']['Pid']}/root{SOCKET}"
    assert call(theirs, "GET /swarm").document["JoinTokens"]["Worker"], "as the machine asks"
    tokens = inside(theirs, "GET /swarm").document["JoinTokens"]
    assert tokens == {"Worker": "", "Manager": ""}, "another container's socket gives no more"
    assert inside(theirs, "POST /swarm/leave?force=1").status == 403
    m1.docker("rm", "--force", full)
    host = m1.socket.removeprefix("unix://")
    for path in (host, "/run/skep/skep.sock"):
        assert inside(path, "GET /services").status == 200, path
        assert inside(path, "POST /swarm/leave?force=1").status == 403, path
    listed = m1.docker("exec", id, "ls", "/host/run/skep").stdout.split()
    assert listed == ["skep.sock"], "the node's other sockets are not there"
    refused = m1.docker("run", "-v", "/run/skep/manager.sock:/m.sock", IMAGE, check=False)
    assert "belongs to this node" in refused.stderr


def test_a_workers_containers_see_what_the_worker_answers(two: TestCluster, m1: TestNode) -> None:
    m1.docker("service", "create", "--detach", "--name", "agents", "--mode", "global", *MOUNT, IMAGE, *IDLE)
    wait_running(m1, "agents", 2)
    api = socket_in(two.node("w1"), "agents")
    assert call(api, "GET /containers/json").status == 200
    assert call(api, "GET /info").document["Swarm"]["ControlAvailable"] is False
    own = call(two.node("w1").socket.removeprefix("unix://"), "GET /services")
    assert call(api, "GET /services") == own
    assert own.status == 503


def test_connections_of_one_container_take_no_other_ones_places(m1: TestNode) -> None:
    flooding, quiet = started(m1, "flooding"), started(m1, "quiet")
    with ExitStack() as opened:
        for _ in range(60):
            opened.enter_context(closing(connected(flooding)))
        assert call(quiet, "GET /services", timeout_s=10).status == 200
        assert m1.client().api.ping(), "nor of the machine's own clients"
    assert call(flooding, "GET /services").status == 200, "it has places again when it has left them"
