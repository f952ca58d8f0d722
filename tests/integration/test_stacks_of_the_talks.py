"""The talks' stack files as written, by the docker command; and the calls of what runs in them, on their own sockets.

The images are small ones of the distribution's programs under the names in the files.  The calls are those in the
programs' sources (Traefik: pkg/provider/docker/pswarm.go; Portainer's agent: docker/docker.go, docker/snapshot.go;
visualizer: server.js, src/utils/request.js).
"""

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import urlopen

import pytest

from skep.playground.images.archive import SymbolicLink
from tests.conftest import SEARCHED
from tests.support.clients.raw_calls import call
from tests.support.machines.playground_rig import (
    TestCluster,
    TestNode,
    a_playground,
    container_pids,
    remove_stacks,
    wait_running,
    wait_until,
)
from tests.support.machines.stand_ins import image, load, script
from tests.support.machines.talks import deploy, fetched

pytestmark = pytest.mark.timeout(240)

PORTAINER = """\
version: '3.2'
services:
  agent:
    image: portainer/agent
    environment:
      AGENT_CLUSTER_ADDR: tasks.agent
    volumes:
      - /var/run/docker.sock:/var/run/docker.sock
      - /var/lib/docker/volumes:/var/lib/docker/volumes
    networks:
      agent_network:
        aliases: [portainer-agent]
    deploy:
      mode: global
      placement:
        constraints: [node.platform.os == linux]
  portainer:
    image: portainer/portainer
    command: -H "tcp://tasks.portainer-agent:9001" --tlsskipverify --no-auth
    ports:
      - "9000:9000"
    volumes:
      - portainer_data:/data
    networks:
      - agent_network
    deploy:
      mode: replicated
      replicas: 1
      placement:
        constraints: [node.role == worker]
networks:
  agent_network:
    driver: overlay
    attachable: true
volumes:
  portainer_data:
"""

VISUALIZER = """\
version: "3"
services:
  visualizer:
    image: dockersamples/visualizer:stable
    ports:
      - "8080:8080"
    stop_grace_period: 1m30s
    volumes:
      - "/var/run/docker.sock:/var/run/docker.sock:ro"
    deploy:
      placement:
        constraints: [node.role == manager]
"""

COINS = """\
version: "3"
services:
  rng:
    image: dockercoins/rng:v0.1
    deploy:
      mode: global
  hasher:
    image: dockercoins/hasher:v0.1
  redis:
    image: redis
  worker:
    image: dockercoins/worker:v0.1
    deploy:
      replicas: 2
      update_config: {parallelism: 2, delay: 1s, failure_action: rollback}
  webui:
    image: dockercoins/webui:v0.1
    ports:
      - "8000:80"
"""

HTTP = "exec httpd -f -v -p"
FIND_AGENTS = """\
(while sleep 0.2; do
    nslookup "$name" 2>/dev/null | sed -n '/^Name/,${s/^Address[^:]*: *//p}' | sort >/w/.new
    mv /w/.new /w/agents
done) &
"""
AGENT = f"""\
mkdir -p /w; hostname >/w/index.html; name=$AGENT_CLUSTER_ADDR
{FIND_AGENTS}
{HTTP} 9001 -h /w
"""
SERVER = f"""\
mkdir -p /w; echo "$@" >/w/arguments; name=${{2#tcp://}}; name=${{name%:*}}
{FIND_AGENTS}
{HTTP} 9000 -h /w
"""
RNG = f"mkdir -p /w; head -c 16 /dev/urandom | md5sum >/w/random; {HTTP} 80 -h /w\n"
WORKER = """\
while :; do
    wget -q -O /tmp/r http://rng/random && wget -q -O /tmp/h http://hasher/random &&
        printf 'INCR coins\\r\\nQUIT\\r\\n' | nc -w 2 redis 6379 >/dev/null
    sleep 0.1
done
"""
WEBUI = f"""\
mkdir -p /w
(while sleep 0.2; do
    printf 'GET coins\\r\\nQUIT\\r\\n' | nc -w 2 redis 6379 | sed -n 2p | tr -d '\\r' >/w/.new
    mv /w/.new /w/coins
done) &
{HTTP} 80 -h /w
"""


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    with a_playground("talks", managers=1, workers=2) as playground:
        scripts = {"agent": AGENT, "server": SERVER, "visualizer": f"{HTTP} 8080 -h /tmp\n", "rng": RNG}
        scripts |= {"worker": WORKER, "webui": WEBUI}
        names = {
            "agent": "portainer/agent:latest",
            "server": "portainer/portainer:latest",
            "visualizer": "dockersamples/visualizer:stable",
            "rng": "dockercoins/rng:v0.1",
            "worker": "dockercoins/worker:v0.1",
            "webui": "dockercoins/webui:v0.1",
        }
        made = [
            image([tag], {f"bin/{name}-started": script(scripts[name])}, [f"/bin/{name}-started"])
            for name, tag in names.items()
        ]
        made.append(image(["dockercoins/hasher:v0.1"], {"bin/h": script(RNG)}, ["/bin/h"]))
        load(playground.node("m1"), tmp_path_factory.mktemp("images"), *made)
        yield playground


@pytest.fixture
def m1(three: TestCluster) -> Iterator[TestNode]:
    node = three.node("m1")
    yield node
    remove_stacks(node)


def socket_in(node: TestNode, service: str) -> str:
    (pid,) = container_pids(node, service).values()
    return f"/proc/{pid}/root/var/run/docker.sock"


def filters(**wanted: Any) -> str:
    """As Go's client writes them since API 1.22."""
    return quote(json.dumps({name.replace("_", "-"): {value: True} for name, value in wanted.items()}))


def test_portainer_finds_its_agents_and_they_their_cluster(
    three: TestCluster, m1: TestNode, tmp_path: Path
) -> None:
    deploy(m1, tmp_path, "portainer", PORTAINER)
    wait_running(m1, "portainer_agent", 3)
    wait_running(m1, "portainer_portainer", 1)
    server = next(node for node in three.nodes() if container_pids(node, "portainer_portainer"))
    assert server.name != "m1"
    at = "http://127.0.0.1:9000/"
    agents = wait_until(
        lambda: (f := fetched(server, "portainer_portainer", f"{at}agents").split()) and len(f) == 3 and f,
        "the server resolves its agents",
    )
    assert all(fetched(server, "portainer_portainer", f"http://{one}:9001/") for one in agents)
    asked = fetched(server, "portainer_portainer", f"{at}arguments").strip()
    assert asked == "-H tcp://tasks.portainer-agent:9001 --tlsskipverify --no-auth"
    for node in three.nodes():
        wait_until(
            lambda node=node: (
                fetched(node, "portainer_agent", "http://127.0.0.1:9001/agents").split() == agents
            ),
            f"the agent on {node.name} resolves the others",
        )
        api = socket_in(node, "portainer_agent")
        head = call(api, "HEAD /_ping")
        assert head.status == 200
        info = call(api, "GET /v1.41/info").document
        assert info["Swarm"]["ControlAvailable"] is (node.name == "m1")
        (id,) = container_pids(node, "portainer_agent")
        mine = call(api, f"GET /v1.41/containers/{id[:12]}/json").document
        assert mine["Config"]["Labels"]["com.docker.swarm.service.name"] == "portainer_agent"
        (network,) = mine["NetworkSettings"]["Networks"].values()
        shown = call(api, f"GET /v1.41/networks/{network['NetworkID']}").document
        assert (shown["Scope"], shown["Ingress"]) == ("swarm", False)
        assert network["IPAddress"] in agents
        for path in ("containers/json?all=1", "images/json", "volumes", "networks", "version"):
            assert call(api, f"GET /v1.41/{path}").status == 200, path
    api = socket_in(m1, "portainer_agent")
    node_id = call(api, "GET /v1.41/info").document["Swarm"]["NodeID"]
    assert call(api, f"GET /v1.41/nodes/{node_id}").document["ManagerStatus"]["Leader"] is True
    resources = [one["Description"]["Resources"] for one in call(api, "GET /v1.41/nodes").document]
    assert len(resources) == 3
    assert all(one["NanoCPUs"] and one["MemoryBytes"] for one in resources)
    stacks = {
        one["Spec"]["Labels"]["com.docker.stack.namespace"]
        for one in call(api, "GET /v1.41/services").document
    }
    assert stacks == {"portainer"}
    shown = m1.docker(
        "exec", next(iter(container_pids(m1, "portainer_agent"))), "ls", "/var/lib/docker/volumes"
    )
    assert shown.stdout.split() == [one["Name"] for one in m1.client().api.volumes()["Volumes"] or []]


def test_the_visualizer_and_traefik_see_what_the_machines_clients_see(m1: TestNode, tmp_path: Path) -> None:
    deploy(m1, tmp_path, "vis", VISUALIZER)
    wait_running(m1, "vis_visualizer", 1)
    api, host = socket_in(m1, "vis_visualizer"), m1.socket.removeprefix("unix://")
    for path in ("/containers/json", "/services", "/tasks", "/networks", "/nodes"):  # the visualizer's
        seen, meant = (call(one, f"GET {path}") for one in (api, host))
        assert seen == meant, path
    node = call(api, "GET /nodes").document[0]
    assert node["Description"]["Resources"]["MemoryBytes"]
    assert node["Status"]["State"] == "ready"
    assert call(api, "HEAD /_ping").status == 200  # Traefik's, by Go's client
    version = call(api, "GET /v1.47/version").document
    assert version["ApiVersion"] >= "1.29"
    (service,) = call(api, "GET /v1.47/services").document
    networks = call(api, f"GET /v1.47/networks?filters={filters(scope='swarm')}").document
    by_id = {one["Id"]: one["Name"] for one in networks}
    reachable = [by_id[one["NetworkID"]] for one in service["Endpoint"]["VirtualIPs"]]
    assert set(reachable) == {"ingress", "vis_default"}
    (task,) = call(
        api, f"GET /v1.47/tasks?filters={filters(service=service['ID'], desired_state='running')}"
    ).document
    assert task["Status"]["State"] == "running"
    attached = {by_id[one["Network"]["ID"]]: one["Addresses"] for one in task["NetworksAttachments"]}
    assert attached["vis_default"]
    assert call(api, f"GET /v1.47/nodes/{task['NodeID']}").document["Status"]["Addr"]


@pytest.mark.needs("prometheus")
def test_prometheus_discovers_the_cluster_by_a_containers_socket(m1: TestNode, tmp_path: Path) -> None:
    deploy(m1, tmp_path, "vis", VISUALIZER)
    wait_running(m1, "vis_visualizer", 1)
    host = f"unix://{socket_in(m1, 'vis_visualizer')}"
    roles = ("services", "tasks", "nodes")
    jobs = [
        {"job_name": role, "dockerswarm_sd_configs": [{"host": host, "role": role, "refresh_interval": "1s"}]}
        for role in roles
    ]
    (tmp_path / "prometheus.yml").write_text(json.dumps({"scrape_configs": jobs}))  # JSON is YAML
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = (
        *(shutil.which("prometheus", path=SEARCHED) or "", f"--config.file={tmp_path}/prometheus.yml"),
        *(f"--web.listen-address=127.0.0.1:{port}", f"--storage.tsdb.path={tmp_path}/data"),
    )
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:

        def discovered() -> dict[str, list[dict[str, str]]]:
            with (
                suppress(OSError),
                urlopen(f"http://127.0.0.1:{port}/api/v1/targets", timeout=10) as response,
            ):
                found = json.load(response)["data"]["activeTargets"]
                labels = [one["discoveredLabels"] for one in found]
                return {role: [one for one in labels if one["job"] == role] for role in roles}
            assert process.poll() is None, (tmp_path / "log").read_text()
            return {}

        found = wait_until(
            lambda: (f := discovered()) and all(f.values()) and f, "all roles are discovered", 60
        )
    finally:
        process.kill()
        process.wait(10)
    meta = "__meta_dockerswarm_"
    assert len(found["nodes"]) == 3
    assert {one[f"{meta}service_name"] for one in found["services"]} == {"vis_visualizer"}
    (task, *_) = found["tasks"]
    assert (task[f"{meta}task_state"], task[f"{meta}node_role"]) == ("running", "manager")
    assert {one[f"{meta}network_name"] for one in found["tasks"]} >= {"vis_default"}


@pytest.mark.slow
def test_coins_are_mined_by_more_workers_and_counted(
    three: TestCluster, m1: TestNode, tmp_path: Path
) -> None:
    redis = image(
        ["redis:latest"],
        {
            "bin/redis-server": SymbolicLink("/usr/bin/redis-check-rdb")
        },  # it looks by which name it was called
        ["redis-server", "--protected-mode", "no"],
        *(["redis-tools"], ["usr/bin/redis-check-rdb"]),
    )
    load(m1, tmp_path, redis)
    deploy(m1, tmp_path, "coins", COINS)
    for name, count in (("rng", 3), ("hasher", 1), ("redis", 1), ("webui", 1), ("worker", 2)):
        wait_running(m1, f"coins_{name}", count, 60)
    web = next(node for node in three.nodes() if container_pids(node, "coins_webui"))

    def coins() -> int:
        said = fetched(web, "coins_webui", "http://127.0.0.1/coins").strip()
        return int(said) if said.isdigit() else 0

    wait_until(lambda: coins() > 5, "coins are mined", 60)
    m1.docker("service", "scale", "--detach", "coins_worker=10")
    wait_running(m1, "coins_worker", 10, 60)
    before = coins()
    wait_until(lambda: coins() > before + 20, "more are mined", 60)
    assert "8000->80" in m1.docker("service", "ls", "--filter", "name=coins_webui").stdout
