"""Unmodified Docker Engines as workers beside skep nodes: what a cluster of both kinds does."""

import json
from collections.abc import Iterator
from functools import partial

import pytest

from skep.model.networks.data_planes import NODE_LABEL
from skep.playground.docker import NO_IPVS, has_ipvs
from tests.support.machines.docker_engines import (
    ENGINES,
    FOR_ENGINES,
    VERSIONS,
    answers,
    attachments,
    clear,
    engine_of,
    fetched,
    inside,
    node_names,
    places,
    wait_inside,
)
from tests.support.machines.playground_rig import (
    IDLE,
    IMAGE,
    TestCluster,
    TestNode,
    containers,
    create,
    no_playground_yet,
    running,
    wait_running,
    wait_until,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.needs("root", "debootstrap"),
    pytest.mark.timeout(600),
]

ON_ENGINES = ("--constraint", "node.labels.kind==docker")
GOES_AT_ONCE = ("--stop-grace-period", "1s")
SERVES = ("busybox", "httpd", "-f", "-p", "80", "-h", "/etc")


@pytest.fixture(scope="module", params=VERSIONS)
def cluster(request: pytest.FixtureRequest) -> Iterator[TestCluster]:
    """One manager, one skep worker, two Docker Engines of a Debian suite with a label."""
    with engine_of(request.param), no_playground_yet("dn") as cluster:
        up = cluster.up(workers=1, docker_workers=2)
        assert (NO_IPVS in up.stderr) is not has_ipvs()
        for name in ENGINES:
            cluster.node("m1").docker("node", "update", "--label-add", "kind=docker", name)
            version = cluster.node(name).docker("version", "--format", "{{.Server.Version}}").stdout
            assert version.startswith(VERSIONS[request.param])
        yield cluster


@pytest.fixture
def m1(cluster: TestCluster) -> Iterator[TestNode]:
    """The manager; whatever a test leaves in the cluster is removed."""
    node = cluster.node("m1")
    try:
        yield node
    finally:
        clear(node, [cluster.node(name) for name in ENGINES])


def test_engines_are_shown_as_docker_shows_its_nodes(cluster: TestCluster, m1: TestNode) -> None:
    shown = m1.docker("node", "ls", "--format", "{{.Hostname}} {{.Status}} {{.Availability}}").stdout
    assert sorted(shown.splitlines()) == [f"{name} Ready Active" for name in ("d1", "d2", "m1", "w1")]
    version = cluster.node("d1").docker("version", "--format", "{{.Server.Version}}").stdout.strip()
    description = m1.client().api.inspect_node("d1")["Description"]
    assert description["Engine"]["EngineVersion"] == version
    assert {"Type": "Network", "Name": "overlay"} in description["Engine"]["Plugins"]
    assert {"Type": "Log", "Name": "json-file"} in description["Engine"]["Plugins"]
    assert description["Platform"] == {"Architecture": "x86_64", "OS": "linux"}
    assert description["Resources"]["NanoCPUs"] > 0
    info = json.loads(cluster.node("d1").docker("info", "--format", "{{json .Swarm}}").stdout)
    assert info["LocalNodeState"] == "active"
    assert not info["ControlAvailable"]


def test_tasks_spread_over_both_kinds_of_nodes_and_leave_a_drained_engine(m1: TestNode) -> None:
    create(m1, "web", 8)
    wait_running(m1, "web", 8)
    assert places(m1, "web") == ["d1", "d1", "d2", "d2", "m1", "m1", "w1", "w1"]
    stayed = {task["ID"] for task in running(m1, "web") if node_names(m1)[task["NodeID"]] != "d1"}
    m1.docker("node", "update", "--availability", "drain", "d1")
    wait_until(lambda: "d1" not in places(m1, "web"), "the engine is drained")
    now = {task["ID"] for task in wait_running(m1, "web", 8)}
    m1.docker("node", "update", "--availability", "active", "d1")
    assert stayed <= now


def test_a_service_on_engines_has_its_secrets_configs_ports_logs_and_health(
    cluster: TestCluster, m1: TestNode
) -> None:
    m1.docker("secret", "create", "s1", "-", stdin="topsecret")
    m1.docker("config", "create", "c1", "-", stdin="plain")
    create(
        *(m1, "web", 2, *ON_ENGINES, "--replicas-max-per-node", "1", "--secret", "s1"),
        *("--config", "source=c1,target=/etc/c1", "--publish", "mode=host,target=80,published=8090"),
        *GOES_AT_ONCE,
        *("--health-cmd", "wget -qO- http://127.0.0.1/c1", "--health-interval", "1s"),
        command=("sh", "-c", f"echo begun; cat /run/secrets/s1 >/etc/s1; exec {' '.join(SERVES)}"),
    )
    wait_running(m1, "web", 2)
    assert places(m1, "web") == ["d1", "d2"]
    for name in ENGINES:
        engine = cluster.node(name)
        (container,) = containers(engine, "web")
        assert "(healthy)" in container["Status"]
        url = f"http://{engine.description['addr']}:8090"
        assert fetched(cluster, "m1", f"{url}/s1") == "topsecret"
        assert fetched(cluster, "m1", f"{url}/c1") == "plain"
    shown = m1.docker("service", "ps", "web", "--format", "{{.Node}} {{.Ports}}").stdout.splitlines()
    assert sorted(shown) == [f"{name} *:8090->80/tcp,*:8090->80/tcp" for name in ENGINES] or sorted(
        shown
    ) == [f"{name} *:8090->80/tcp" for name in ENGINES]
    lines = m1.docker("service", "logs", "--raw", "web").stdout.splitlines()
    assert lines == ["begun", "begun"]


def test_an_engines_tasks_are_restarted_updated_and_rolled_back(cluster: TestCluster, m1: TestNode) -> None:
    create(m1, "web", 2, *ON_ENGINES, "--restart-delay", "0s", "--update-delay", "0s")
    first = {task["ID"] for task in wait_running(m1, "web", 2)}
    d1 = cluster.node("d1")
    (container,) = containers(d1, "web")
    d1.docker("kill", container["Id"])
    wait_until(lambda: len({task["ID"] for task in running(m1, "web")} - first) == 1, "one task is replaced")
    second = {task["ID"] for task in wait_running(m1, "web", 2)}
    assert len(first & second) == 1

    m1.docker("service", "update", "--detach", "--env-add", "A=1", "web")
    wait_until(lambda: not second & {task["ID"] for task in running(m1, "web")}, "both tasks are new")
    wait_running(m1, "web", 2)
    (container,) = containers(d1, "web")
    assert "A=1" in d1.client().api.inspect_container(container["Id"])["Config"]["Env"]
    m1.docker("service", "rollback", "--detach", "web")
    wait_until(
        lambda: (
            all("Env" not in task["Spec"]["ContainerSpec"] for task in running(m1, "web"))
            and len(running(m1, "web")) == 2
        ),
        "both tasks are as before",
    )


def test_containers_on_an_overlay_of_engines_reach_each_other_by_address_and_name(
    cluster: TestCluster, m1: TestNode
) -> None:
    m1.docker("network", "create", "-d", "overlay", *FOR_ENGINES, "net1")
    create(m1, "web", 2, "--network", "net1", "--endpoint-mode", "dnsrr", "--replicas-max-per-node", "1")
    tasks = wait_running(m1, "web", 2)
    assert places(m1, "web") == ["d1", "d2"]
    addresses = {task["NetworksAttachments"][0]["Addresses"][0].split("/")[0] for task in tasks}
    assert len(addresses) == 2
    for name in ENGINES:
        engine = cluster.node(name)
        (container,) = containers(engine, "web")
        for address in addresses:
            wait_inside(engine, container["Id"], *answers(address))
        for word in ("tasks.web", "web"):
            found = wait_inside(engine, container["Id"], min(addresses), "busybox", "nslookup", word)
            assert max(addresses) in found

    network = m1.client().api.inspect_network("net1")
    assert network["IPAM"]["Config"][0]["Subnet"].endswith("/24")
    assert network["Options"]["skep.data-plane"] == "docker"
    create(m1, "elsewhere", 1, "--network", "net1", "--constraint", "node.hostname==w1")
    reason = "overlay network belongs to docker nodes, which does not fit 2 nodes"
    wait_until(
        lambda: (
            reason in m1.docker("service", "ps", "elsewhere", "--no-trunc", "--format", "{{.Error}}").stdout
        ),
        "the pending task says why",
    )


def test_an_overlay_for_skep_nodes_keeps_engines_out(m1: TestNode) -> None:
    m1.docker("network", "create", "-d", "overlay", "--label", "skep.data-plane=skep", "net2")
    create(m1, "web", 1, "--network", "net2", *ON_ENGINES)
    reason = "overlay network belongs to skep nodes, which does not fit 2 nodes"
    wait_until(
        lambda: reason in m1.docker("service", "ps", "web", "--no-trunc", "--format", "{{.Error}}").stdout,
        "the pending task says why",
    )
    refused = m1.docker(
        "network", "create", "-d", "overlay", "--opt", "skep.data-plane=other", "net3", check=False
    )
    assert "skep.data-plane is docker or skep, not 'other'" in refused.stderr


def test_a_plain_container_joins_an_attachable_network_and_holds_it(
    cluster: TestCluster, m1: TestNode
) -> None:
    m1.docker("network", "create", "-d", "overlay", "--attachable", *FOR_ENGINES, "net1")
    m1.docker("network", "create", "-d", "overlay", "net2")
    create(m1, "web", 1, "--network", "net1", "--endpoint-mode", "dnsrr", "--constraint", "node.hostname==d1")
    (web,) = wait_running(m1, "web", 1)
    d2 = cluster.node("d2")
    run = ("run", "--detach", "--label", "plain", "--name", "plain", "--network", "net1", IMAGE, *IDLE)
    container = d2.docker(*run).stdout.strip()
    (attachment,) = attachments(m1)
    assert attachment["Spec"]["NetworkAttachmentSpec"]["ContainerID"] == container
    assert node_names(m1)[attachment["NodeID"]] == "d2"
    address = attachment["NetworksAttachments"][0]["Addresses"][0]
    assert address in inside(d2, container, "busybox", "ip", "addr")
    of_web = web["NetworksAttachments"][0]["Addresses"][0].split("/")[0]
    wait_inside(d2, container, of_web, "busybox", "nslookup", "web")
    wait_inside(d2, container, *answers(of_web))

    m1.docker("service", "rm", "web")
    wait_until(lambda: len(m1.client().api.tasks()) == 0, "only the container is left on the network")
    refused = m1.docker("network", "rm", "net1", check=False)
    assert f"is in use by task {attachment['ID']}" in refused.stderr
    d2.docker("rm", "-f", container)
    wait_until(lambda: not attachments(m1), "the attachment goes with its container")
    m1.docker("network", "rm", "net1")

    refused = d2.docker("run", "--rm", "--label", "plain", "--network", "net2", IMAGE, "true", check=False)
    assert "not manually attachable" in refused.stderr


def test_engines_are_on_the_ingress_network_and_virtual_addresses_are_given(
    cluster: TestCluster, m1: TestNode
) -> None:
    m1.docker("network", "create", "-d", "overlay", *FOR_ENGINES, "net1")
    options = ("--network", "net1", "--publish", "8091:80", "--replicas-max-per-node", "1", *ON_ENGINES)
    create(m1, "web", 2, *options, *GOES_AT_ONCE, command=SERVES)
    wait_running(m1, "web", 2)
    endpoint = m1.client().api.inspect_service("web")["Endpoint"]
    assert len(endpoint["VirtualIPs"]) == 2
    networks = {network["Id"]: network for network in m1.client().api.networks()}
    given = {networks[one["NetworkID"]]["Name"]: one["Addr"] for one in endpoint["VirtualIPs"]}
    assert set(given) == {"ingress", "net1"}
    for name in ENGINES:
        engine = cluster.node(name)
        ingress = engine.client().api.inspect_network("ingress")
        assert ingress["IPAM"]["Config"][0]["Subnet"] == "10.0.0.0/24"
        (container,) = containers(engine, "web")
        wait_inside(engine, container["Id"], given["net1"].split("/")[0], "busybox", "nslookup", "web")
        url = f"http://{engine.description['addr']}:8091/hostname"
        if has_ipvs():
            wait_until(partial(fetched, cluster, "m1", url), f"the routing mesh of {name} answers")
        else:
            # What an engine does then: it says so in its log, the task runs on, and nothing answers at the port.
            assert "ipvs is not enabled in your kernel" in (cluster.directory / name / "skep.log").read_text()
            assert not fetched(cluster, "m1", url)


def test_an_engine_is_no_manager(cluster: TestCluster, m1: TestNode) -> None:
    refused = m1.docker("node", "promote", "d1", check=False)
    assert "node d1 is a Docker Engine and cannot manage this cluster" in refused.stderr
    assert m1.client().api.inspect_node("d1")["Spec"]["Role"] == "worker"


def test_an_engine_brings_what_it_counts_and_can_leave_and_be_removed(
    cluster: TestCluster, m1: TestNode
) -> None:
    cluster.skep("add", "--docker", "worker", "d3")
    try:
        d3 = cluster.node("d3")
        cluster.skep("kill", "d3")
        said = {"node-generic-resources": ["gpu=UUID1"], "labels": [f"{NODE_LABEL}=true"]}
        (cluster.directory / "d3" / "daemon.json").write_text(json.dumps(said))
        cluster.skep("start", "d3")
        swarm = m1.client().api.inspect_swarm()
        address = m1.description["addr"]
        refused = d3.docker(
            "swarm", "join", "--token", swarm["JoinTokens"]["Manager"], f"{address}:2377", check=False
        )
        assert "takes Docker engines as workers only" in refused.stderr
        d3.docker("swarm", "join", "--token", swarm["JoinTokens"]["Worker"], f"{address}:2377")
        description = m1.client().api.inspect_node("d3")["Description"]
        generic = description["Resources"]["GenericResources"]
        assert generic == [{"NamedResourceSpec": {"Kind": "gpu", "Value": "UUID1"}}]
        # It says that it is a Skep node, and joined as an engine.
        assert description["Engine"]["Labels"][NODE_LABEL] == "true"
        refused = m1.docker("node", "promote", "d3", check=False)
        assert "node d3 is a Docker Engine and cannot manage this cluster" in refused.stderr
        create(m1, "web", 1, "--generic-resource", "gpu=1")
        wait_running(m1, "web", 1, within_s=90)
        assert places(m1, "web") == ["d3"]
        (container,) = containers(d3, "web")
        assert (
            "DOCKER_RESOURCE_GPU=UUID1" in d3.client().api.inspect_container(container["Id"])["Config"]["Env"]
        )
        d3.docker("swarm", "leave")
        wait_until(lambda: not containers(d3, "web"), "its containers are gone")
        api = m1.client().api
        wait_until(lambda: api.inspect_node("d3")["Status"]["State"] == "down", "the node is down", 40)
        m1.docker("node", "rm", "d3")
        assert "d3" not in node_names(m1).values()
        assert not m1.docker("service", "ps", "web", "-f", "node=d3", check=False).stdout
    finally:
        cluster.skep("kill", "d3", check=False)
