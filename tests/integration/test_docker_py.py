"""docker-py, unchanged, against a node of Skep: services, tasks, nodes, containers, logs, exec, events, images."""

import io
import time

import docker
import pytest
from docker.errors import APIError, BuildError, ImageNotFound, NotFound
from docker.models.containers import Container
from docker.models.services import Service
from docker.types import (
    EndpointSpec,
    Healthcheck,
    Mount,
    Resources,
    RestartPolicy,
    RollbackConfig,
    ServiceMode,
    UpdateConfig,
)

from tests.support.machines.playground_rig import IMAGE, TestNode, wait_running, wait_until

pytestmark = pytest.mark.timeout(120)

TALK = ["sh", "-c", "echo hello; trap 'exit 0' TERM; while :; do sleep 1; done"]


@pytest.fixture
def client(m1: TestNode) -> docker.DockerClient:
    return m1.client()


@pytest.fixture
def web(m1: TestNode, client: docker.DockerClient) -> Service:
    service = client.services.create(
        IMAGE, TALK, name="web", mode=ServiceMode("replicated", 2), labels={"tier": "front"}
    )
    wait_running(m1, "web", 2)
    return service


@pytest.fixture
def container(client: docker.DockerClient, web: Service) -> Container:
    return client.containers.list(filters={"label": "com.docker.swarm.service.name=web"})[0]


def test_a_service_with_every_kind_of_setting_comes_back_as_it_was_given(client: docker.DockerClient) -> None:
    service = client.services.create(
        IMAGE,
        ["sleep", "600"],
        name="full",
        env=["A=b"],
        labels={"l": "1"},
        container_labels={"c": "1"},
        constraints=["node.role == manager"],
        preferences=[("spread", "node.labels.rack")],
        maxreplicas=3,
        hostname="h-{{.Task.Slot}}",
        init=True,
        mounts=[Mount("/v", "v1", type="volume"), Mount("/t", None, type="tmpfs")],
        endpoint_spec=EndpointSpec(ports={18095: (80, "tcp", "host")}),
        resources=Resources(cpu_limit=10**9, mem_limit=64 << 20, mem_reservation=8 << 20),
        restart_policy=RestartPolicy("on-failure", delay=10**9, max_attempts=2, window=10**9),
        update_config=UpdateConfig(parallelism=2, delay=1, failure_action="rollback", order="start-first"),
        rollback_config=RollbackConfig(parallelism=1, failure_action="pause"),
        healthcheck=Healthcheck(test=["CMD", "true"], interval=10**9),
        stop_grace_period=10**9,
        user="1000",
        workdir="/tmp",
        read_only=True,
        cap_add=["NET_ADMIN"],
        sysctls={"net.ipv4.ip_forward": "1"},
        log_driver="json-file",
        log_driver_options={"max-size": "1m"},
    )
    spec = client.services.get(service.id).attrs["Spec"]
    template = spec["TaskTemplate"]
    assert template["ContainerSpec"]["Env"] == ["A=b"]
    assert template["ContainerSpec"]["Healthcheck"] == {"Test": ["CMD", "true"], "Interval": 10**9}
    assert template["Placement"]["Preferences"] == [{"Spread": {"SpreadDescriptor": "node.labels.rack"}}]
    assert template["Placement"]["MaxReplicas"] == 3
    assert template["Resources"]["Limits"] == {"NanoCPUs": 10**9, "MemoryBytes": 64 << 20}
    assert template["LogDriver"] == {"Name": "json-file", "Options": {"max-size": "1m"}}
    assert spec["UpdateConfig"]["Order"] == "start-first"
    assert spec["EndpointSpec"]["Ports"][0]["PublishMode"] == "host"
    wait_until(lambda: [t for t in service.tasks() if t["Status"]["State"] == "running"], "the task runs")


def test_services_are_listed_updated_scaled_and_removed(client: docker.DockerClient, web: Service) -> None:
    assert [service.name for service in client.services.list(filters={"label": "tier=front"})] == ["web"]
    assert client.services.list(filters={"name": "other"}) == []
    assert web.scale(3)
    web.reload()
    assert web.attrs["Spec"]["Mode"] == {"Replicated": {"Replicas": 3}}
    wait_until(lambda: len([t for t in web.tasks() if t["Status"]["State"] == "running"]) == 3, "three run")
    assert web.update(labels={"tier": "back"})
    web.reload()
    assert web.attrs["Spec"]["Labels"] == {"tier": "back"}
    assert web.force_update()
    web.remove()
    with pytest.raises(NotFound, match=r"service .* not found"):
        client.services.get("web")


def test_a_stale_version_is_refused(client: docker.DockerClient, web: Service) -> None:
    with pytest.raises(APIError, match="update out of sequence"):
        client.api.update_service(web.id, 1, name="web", fetch_current_spec=True)


def test_tasks_are_found_by_service_node_and_state(client: docker.DockerClient, web: Service) -> None:
    tasks = web.tasks(filters={"desired-state": "running"})
    assert sorted(task["Slot"] for task in tasks) == [1, 2]
    assert len(client.api.tasks(filters={"node": "m1", "service": "web"})) == 2
    assert client.api.inspect_task(tasks[0]["ID"])["Status"]["ContainerStatus"]["ContainerID"]


def test_logs_of_a_service_come_whole_and_as_a_stream(client: docker.DockerClient, web: Service) -> None:
    def said() -> bytes:
        return b"".join(web.logs(stdout=True, stderr=True))

    wait_until(lambda: said() == b"hello\nhello\n", "a line of each task")
    followed = web.logs(stdout=True, follow=True)
    assert {next(followed), next(followed)} == {b"hello\n"}


def test_nodes_are_listed_and_updated(client: docker.DockerClient) -> None:
    (node,) = client.nodes.list(filters={"role": "manager"})
    assert node.attrs["Description"]["Hostname"] == "m1"
    spec = node.attrs["Spec"]
    assert node.update({**spec, "Labels": {"rack": "1"}})
    node.reload()
    assert node.attrs["Spec"]["Labels"] == {"rack": "1"}
    assert node.update({**spec, "Labels": {}})


def test_the_swarm_shows_its_tokens_and_is_updated(client: docker.DockerClient) -> None:
    client.swarm.reload()
    before = client.swarm.attrs["JoinTokens"]["Worker"]
    assert client.swarm.update(rotate_worker_token=True)
    client.swarm.reload()
    assert client.swarm.attrs["JoinTokens"]["Worker"] != before
    assert client.info()["Swarm"]["ControlAvailable"] is True
    assert client.version()["ApiVersion"]
    assert client.ping()


def test_containers_are_listed_inspected_watched_and_entered(
    client: docker.DockerClient, container: Container
) -> None:
    assert container.status == "running"
    assert container.labels["com.docker.swarm.service.name"] == "web"
    assert container.name.startswith("web.")
    wait_until(lambda: container.logs() == b"hello\n", "what it said")
    assert container.logs(timestamps=True, tail=1).endswith(b"Z hello\n")
    assert any("sh" in " ".join(row) for row in container.top()["Processes"])
    assert container.stats(stream=False)["pids_stats"]["current"] >= 1


def test_commands_are_run_in_a_container(container: Container) -> None:
    assert container.exec_run(["echo", "inside"]) == (0, b"inside\n")
    assert container.exec_run("sh -c 'exit 7'").exit_code == 7
    both = container.exec_run(["sh", "-c", "echo out; echo err >&2"], demux=True).output
    assert both == (b"out\n", b"err\n")
    assert container.exec_run("pwd", workdir="/tmp", environment={"A": "b"}).output == b"/tmp\n"
    assert container.exec_run("id -u", user="5").output == b"5\n"
    assert container.exec_run("test -t 0", tty=True, stdin=True).exit_code == 0
    assert list(container.exec_run("echo streamed", stream=True).output) == [b"streamed\n"]
    container.exec_run("touch /tmp/made", detach=True)
    wait_until(
        lambda: container.exec_run("test -e /tmp/made").exit_code == 0, "what was started in the background"
    )


def test_a_container_is_killed_and_waited_for(client: docker.DockerClient, container: Container) -> None:
    container.kill()
    assert container.wait()["StatusCode"] == 137
    with pytest.raises(APIError, match="is not running"):
        container.exec_run("true")


def test_events_of_services_and_containers_come_in_one_stream(
    client: docker.DockerClient, web: Service
) -> None:
    since = int(time.time()) - 60
    events = client.events(since=since, until=int(time.time()) + 1, decode=True)
    seen = {(event["Type"], event["Action"]) for event in events}
    assert {("service", "create"), ("container", "create"), ("container", "start")} <= seen
    only = client.events(since=since, until=int(time.time()), decode=True, filters={"type": "service"})
    assert {event["Type"] for event in only} == {"service"}


def test_images_are_listed_tagged_saved_loaded_and_removed(client: docker.DockerClient) -> None:
    unnamed, _ = client.images.build(fileobj=io.BytesIO(f"FROM {IMAGE}\nENV A=1\nENV B=1\n".encode()))
    assert unnamed.tags == []
    steps = [step["Id"] for step in unnamed.history()][:2]
    assert steps[0] == unnamed.id
    client.images.prune()
    for id in steps:  # the step before, too
        with pytest.raises(ImageNotFound):
            client.images.get(id)
    image = client.images.get(IMAGE)
    assert IMAGE in image.tags
    assert image.tag("again", "1")
    assert client.images.list("again")[0].id == image.id
    archive = b"".join(client.images.get("again:1").save(named="again:1"))
    client.images.remove("again:1")
    with pytest.raises(ImageNotFound):
        client.images.get("again:1")
    assert client.images.load(io.BytesIO(archive))[0].id == image.id
    client.images.remove("again:1")
    assert image.history()
    client.images.prune()
    assert client.images.get(IMAGE).id == image.id, "what has a name stays"
    with pytest.raises(APIError):
        client.images.pull("127.0.0.1:1/nosuch", tag="1")
    assert client.df()["LayersSize"] > 0


def test_images_are_built_and_used_by_services(m1: TestNode, client: docker.DockerClient) -> None:
    dockerfile = io.BytesIO(
        f"FROM {IMAGE}\nARG WORD\nRUN echo $WORD > /word\nCMD cat /word; sleep 600\n".encode()
    )
    image, lines = client.images.build(fileobj=dockerfile, tag="built:1", buildargs={"WORD": "salted"})
    said = "".join(line.get("stream", "") for line in lines)
    assert image.tags == ["built:1"]
    assert "Step 4/4 : CMD cat /word; sleep 600\n" in said
    assert said.endswith("Successfully tagged built:1\n")
    with pytest.raises(BuildError, match="returned a non-zero code: 2") as raised:
        client.images.build(fileobj=io.BytesIO(f"FROM {IMAGE}\nRUN exit 2\n".encode()), tag="built:2")
    assert "Step 2/2" in "".join(line.get("stream", "") for line in raised.value.build_log)
    service = client.services.create("built:1", name="built", stop_grace_period=1_000_000_000)
    wait_until(lambda: b"salted" in b"".join(service.logs(stdout=True)), "the built image runs")
    service.remove()
    wait_until(lambda: not client.api.containers(all=True, filters={"ancestor": "built:1"}), "it is gone")
    client.images.remove("built:1", force=True)


def test_secrets_and_configs_are_kept(client: docker.DockerClient) -> None:
    secret = client.secrets.create(name="s1", data=b"hidden")
    config = client.configs.create(name="c1", data=b"shown")
    assert [one.name for one in client.secrets.list(filters={"name": "s1"})] == ["s1"]
    assert "Data" not in client.secrets.get(secret.id).attrs["Spec"]
    assert client.configs.get(config.id).attrs["Spec"]["Data"] == "c2hvd24="
    secret.remove()
    config.remove()


def test_a_plain_container_runs_without_an_engine(client: docker.DockerClient) -> None:
    assert client.containers.run(IMAGE, ["echo", "hello"], remove=True) == b"hello\n"
    with pytest.raises(APIError, match="--storage-opt") as refused:
        client.containers.run(IMAGE, "true", storage_opt={"size": "1G"})
    assert refused.value.status_code == 501
