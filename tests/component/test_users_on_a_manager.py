"""What users of the API get from a manager's routes, with their objects in a store."""

import asyncio
import base64
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from random import Random
from typing import Any, cast

import msgspec
import pytest
from aiohttp import web
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.api.access.identity import identify
from skep.api.http.server import application as api_application
from skep.api.http.server import runner
from skep.errors import Unavailable
from skep.manager.journal.loop import Journal
from skep.manager.routes import application
from skep.manager.routes.access import ManagerApi, Tunnelling
from skep.manager.routes.guard.authorization import ClusterObjects
from skep.model.container import ContainerSpec, Mount
from skep.model.history import JournalEntry
from skep.model.network import Network
from skep.model.permissions.access import Identity, Origin, parse_binding
from skep.model.service import NetworkAttachmentConfig, Resources, Service, UpdateState, UpdateStatus
from skep.model.swarm import Swarm
from skep.model.task import ContainerStatus, Restart, Task, TaskState, TaskStatus
from skep.model.task_end import KeptLine, TaskEnd
from skep.model.values.ids import NodeId, ServiceId
from skep.model.values.stacks import STACK_LABEL
from skep.model.values.times import Timestamp
from tests.conformance.manager import a_manager_api
from tests.support.builders import a_node, a_service, a_service_spec, a_task
from tests.support.store.store_transactions import a_network, put

OPERATOR = "operator"
SHOP = {STACK_LABEL: "shop"}
NO_NODE = 503
"""The status of what was allowed and needs a node."""


def running(id: str, service: Service) -> Task:
    """A task with a container, made from the present spec of ``service``."""
    status = TaskStatus(state=TaskState.RUNNING, container_status=ContainerStatus(container_id="c1"))
    return replace(a_task(id, service=service, node="n1"), status=status)


def labeled(service: Service, labels: Mapping[str, str]) -> Service:
    return replace(service, spec=replace(service.spec, labels=labels))


class NoTunnels:
    def open(self, *_: Any, **__: Any) -> Any:
        raise Unavailable("there is no node")


class Recording(Journal):
    def __init__(self, api: ManagerApi) -> None:
        super().__init__(api.store, NodeId("m1"), SystemClock(), Random(1))
        self.entries: list[JournalEntry] = []

    def record(self, entry: JournalEntry) -> None:
        self.entries.append(entry)


class Rig:
    def __init__(self, api: ManagerApi, new_handler: Any, journal: Recording) -> None:
        self.api, self._new_handler, self.journal = api, new_handler, journal

    async def exchange(
        self, role: str, request: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, str, bool]:
        """Status and body of a response to a user with a token, and whether the connection is closed after it."""
        ours, theirs = socket.socketpair()
        transport, _ = await asyncio.get_running_loop().connect_accepted_socket(self._new_handler, theirs)
        identify(transport, Identity(name="ann", origin=Origin.TOKEN, bindings=(parse_binding(role),)))
        reader, writer = await asyncio.open_connection(sock=ours)
        data = msgspec.json.encode(body) if body is not None else b""
        sent = {"Host": "m", "Content-Length": str(len(data)), **(headers or {})}
        head = "".join(f"{name}: {value}\r\n" for name, value in sent.items())
        writer.write(f"{request} HTTP/1.1\r\n{head}\r\n".encode() + data)
        try:
            answered = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(answered.partition("content-length: ")[2].split("\r\n")[0] or 0)  # 204 has none
            text = (await reader.readexactly(length)).decode()
            return int(answered.split()[1]), text, "connection: close" in answered
        finally:
            writer.close()
            transport.abort()


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with _a_rig() as made:
        yield made


@asynccontextmanager
async def _a_rig(**parts: Any) -> AsyncIterator[Rig]:
    async with a_manager_api() as api:
        journal = Recording(api)
        tunnels = cast("Tunnelling", NoTunnels())
        served = runner(application(replace(api, journal=journal, tunnels=tunnels, **parts)))
        await served.setup()
        try:
            yield Rig(api, served.server, journal)
        finally:
            await served.cleanup()


async def test_an_operator_gets_no_network_of_the_machine_by_its_id(rig: Rig) -> None:
    for name in ("host", "bridge"):
        id = rig.api.store.view().resolve(Network, name).id
        attached = [{"Target": id}]
        spec = {"Name": "web", "TaskTemplate": {"ContainerSpec": {"Image": "none"}, "Networks": attached}}
        status, text, _ = await rig.exchange(OPERATOR, "POST /services/create", spec)
        assert status == 403, text
        assert f"the machine's network {name}" in text
        # Nor is one that an administrator made changed.
        made = a_service(f"on-{name}")
        template = replace(made.spec.task_template, networks=(NetworkAttachmentConfig(target=id),))
        await rig.api.store.update(put, replace(made, spec=replace(made.spec, task_template=template)))
        assert (await rig.exchange(OPERATOR, f"DELETE /services/on-{name}"))[0] == 403


@pytest.mark.parametrize(
    "options",
    [
        {"syslog-address": "tcp+tls://10.0.0.9:6514", "syslog-tls-key": "/var/lib/skep/node.key"},
        {"syslog-address": "unix:///run/other.sock"},
        {"syslog-address": " UN\nIX:///run/other.sock"},
    ],
)
async def test_an_operator_gets_no_file_of_the_machine_by_a_log_driver(
    rig: Rig, options: Mapping[str, str]
) -> None:
    template = {
        "ContainerSpec": {"Image": "none"},
        "LogDriver": {"Name": "syslog", "Options": options},
    }
    spec = {"Name": "web", "TaskTemplate": template}
    status, text, _ = await rig.exchange(OPERATOR, "POST /services/create", spec)
    assert status == 403, text
    assert "a file of its machine (log option syslog-" in text
    template["LogDriver"] = {"Name": "syslog", "Options": {"syslog-address": "tcp://10.0.0.9:6514"}}
    assert (await rig.exchange(OPERATOR, "POST /services/create", spec))[0] == 201


async def test_an_operator_gets_no_container_that_runs_with_rights_its_service_had_once(rig: Rig) -> None:
    bind = (Mount(type="bind", source="/", target="/host"),)
    made = labeled(a_service("shop_x"), SHOP)
    assert made.spec.task_template.container_spec is not None
    template = replace(
        made.spec.task_template, container_spec=replace(made.spec.task_template.container_spec, mounts=bind)
    )
    service = await rig.api.store.update(put, replace(made, spec=replace(made.spec, task_template=template)))
    await rig.api.store.update(put, running("old", service))
    for number in (1, 2):
        present = rig.api.store.view().get(Service, service.id)
        plain = replace(made.spec, task_template=a_service_spec(image=f"plain:{number}").task_template)
        await rig.api.store.update(put, replace(present, spec=plain, previous_spec=present.spec))
    await rig.api.store.update(put, running("new", rig.api.store.view().get(Service, service.id)))
    for role in (OPERATOR, "operator:shop"):
        for request in ("POST {}/container/exec", "GET {}/container/archive?path=/", "POST {}/port/80"):
            status, text, _ = await rig.exchange(role, request.format("/skep/tasks/old"), {"Cmd": ["sh"]})
            assert status == 403, (request, text)
            assert "it has a bind mount of /, which only administrators may give" in text
        assert (await rig.exchange(role, "POST /skep/tasks/new/container/exec", {"Cmd": ["sh"]}))[
            0
        ] == NO_NODE
    assert (await rig.exchange("viewer", "GET /skep/tasks/old/container/json"))[0] == NO_NODE


@pytest.mark.parametrize("role", ["viewer", "viewer:shop", "operator"])
async def test_no_environment_and_no_process_of_others_is_among_the_processes_of_a_container(
    rig: Rig, role: str
) -> None:
    service = await rig.api.store.update(put, labeled(a_service("shop_web"), SHOP))
    await rig.api.store.update(put, running("t1", service))
    top = "GET /v1.41/skep/tasks/t1/container/top"
    for arguments in ("eww", "-eo%20etimes=PID,args", "-eorss=PID%20-oargs%20eww", "-ef&ps_args=e"):
        status, text, _ = await rig.exchange(role, f"{top}?ps_args={arguments}")
        assert status == 403, (arguments, text)
        assert "only administrators may run ps with" in text
    for query in ("", "?ps_args=-ef", "?ps_args=aux", "?ps_args=-eo%20pid,args", "?ps_args=-o+pid,comm"):
        assert (await rig.exchange(role, f"{top}{query}"))[0] == NO_NODE


async def test_an_operator_of_a_stack_gets_no_volume_of_another_one_by_a_placeholder(rig: Rig) -> None:
    await rig.api.store.update(put, labeled(a_service("shop_eu_web"), {STACK_LABEL: "shop_eu"}))

    async def create(source: str) -> tuple[int, str, bool]:
        container = {
            "Image": "none",
            "Mounts": [{"Type": "volume", "Source": source, "Target": "/data"}],
        }
        spec = {
            "Name": "shop_db",
            "Labels": SHOP,
            "TaskTemplate": {"ContainerSpec": container},
        }
        return await rig.exchange("operator:shop", "POST /services/create", spec)

    status, text, _ = await create('shop_{{"eu_data"}}')
    assert (status, "whatever its placeholders become" in text) == (403, True), text
    assert (await create("shop_data_{{.Task.Slot}}"))[0] == 201


@pytest.mark.parametrize("mode", ["ingress", "host"])
async def test_only_administrators_publish_on_ports_of_the_cluster(rig: Rig, mode: str) -> None:
    async def create(role: str, protocol: str, number: int) -> tuple[int, str, bool]:
        port = {"Protocol": protocol, "TargetPort": 80, "PublishedPort": number, "PublishMode": mode}
        spec = {
            "Name": f"shop_{protocol.lower()}{number}",
            "Labels": SHOP,
            "TaskTemplate": {"ContainerSpec": {"Image": "none"}},
            "EndpointSpec": {"Ports": [port]},
        }
        return await rig.exchange(role, "POST /services/create", spec)

    for role in (OPERATOR, "operator:shop"):
        # Whatever is no protocol is tcp, as in the engine.
        for written, protocol, number, use in (
            ("tcp", "tcp", 22, "SSH"),
            ("TCP", "tcp", 22, "SSH"),
            ("", "tcp", 22, "SSH"),
            ("xyz", "tcp", 22, "SSH"),
            ("udp", "udp", 4789, "overlay networks"),
            ("Udp", "udp", 4789, "overlay networks"),
        ):
            status, text, _ = await create(role, written, number)
            assert status == 403, text
            assert f"the reserved port {number}/{protocol} ({use}): only administrators may give that" in text
    if mode == "host":  # in ingress mode, it needs the ingress network
        assert (await create("operator:shop", "tcp", 8080))[0] == 201
        assert (await create("admin", "udp", 4789))[0] == 201


async def test_the_entry_of_a_deploy_names_the_services_that_it_changed(rig: Rig) -> None:
    def spec(name: str, image: str = "app:1") -> Mapping[str, Any]:
        return {"Name": name, "Labels": SHOP, "TaskTemplate": {"ContainerSpec": {"Image": image}}}

    changes = [{"Spec": spec(f"shop_{name}")} for name in "abcdefg"] + [{"Spec": spec("shop_bad", "UPPER:1")}]
    assert (await rig.exchange("operator:shop", "POST /skep/services/changes", changes))[0] == 200
    messages = [one.message for one in rig.journal.entries]
    assert messages == ["change service shop_a, shop_b, shop_c, shop_d, shop_e and 2 more"]


async def test_an_operator_changes_a_service_whose_log_driver_an_administrator_chose(rig: Rig) -> None:
    def spec(driver: str, image: str = "app:1") -> Mapping[str, Any]:
        template = {"ContainerSpec": {"Image": image}, "LogDriver": {"Name": driver}}
        return {"Name": "shop_web", "Labels": SHOP, "TaskTemplate": template}

    status, text, _ = await rig.exchange("operator:shop", "POST /services/create", spec("journald"))
    assert (status, "the machine's own log" in text) == (403, True)
    assert (await rig.exchange("admin", "POST /services/create", spec("journald")))[0] == 201
    (service,) = rig.api.store.view().find(Service)
    update = f"POST /services/{service.id}/update?version={service.version.index}"
    assert (await rig.exchange("operator:shop", update, spec("journald", "app:2")))[0] == 200
    (service,) = rig.api.store.view().find(Service)
    update = f"POST /services/{service.id}/update?version={service.version.index}"
    status, text, _ = await rig.exchange("operator:shop", update, spec("syslog", "app:2"))
    assert (status, "the machine's own log" in text) == (403, True)


@pytest.mark.parametrize("request_path", ["update?version={}&rollback=previous", "update/abort?version={}"])
async def test_a_rollback_has_the_rights_of_its_user_and_not_of_the_one_who_wrote_the_previous_spec(
    rig: Rig, request_path: str
) -> None:
    """An administrator joined the service with another stack's network for a while."""
    network = a_network("blog_n")
    network = replace(network, spec=replace(network.spec, labels={STACK_LABEL: "blog"}))
    service = labeled(a_service("shop_web"), SHOP)
    template = replace(service.spec.task_template, networks=(NetworkAttachmentConfig(target=network.id),))
    previous = replace(service.spec, task_template=template)
    updated = replace(service, previous_spec=previous, update_status=UpdateStatus(state=UpdateState.UPDATING))
    for one in (network, updated):
        await rig.api.store.update(put, one)
    body = {"Name": "shop_web", "Labels": SHOP, "TaskTemplate": {"ContainerSpec": {"Image": "busybox:1"}}}
    for role, expected in (("operator:shop", 403), (OPERATOR, 200)):
        (present,) = rig.api.store.view().find(Service)
        prefix = "/skep" if "abort" in request_path else ""
        path = f"POST {prefix}/services/{present.id}/{request_path.format(present.version.index)}"
        status, text, _ = await rig.exchange(role, path, body)
        assert status == expected, text


async def test_a_plan_and_an_explanation_name_no_service_of_another_stack(rig: Rig) -> None:
    room = Resources(memory_bytes=4 << 30)
    batch = labeled(a_service("blog_db", reserve=room), {STACK_LABEL: "blog"})
    important = {**SHOP, "skep.priority": "10"}  # an administrator gave it
    shop = labeled(a_service("shop_web", reserve=room), important)
    (swarm,) = rig.api.store.view().find(Swarm)
    await rig.api.store.update(
        put, replace(swarm, spec=replace(swarm.spec, labels={"skep.preemption": "true"}))
    )
    pending = a_task("t2", service=shop, state=TaskState.PENDING)
    for one in (a_node("n1", has=room), batch, shop, a_task("t1", service=batch, node="n1"), pending):
        await rig.api.store.update(put, one)

    async def planned(role: str, name: str, labels: Mapping[str, str]) -> tuple[int, Any]:
        spec = {
            "Name": name,
            "Labels": labels,
            "Mode": {"Replicated": {"Replicas": 1}},
            "TaskTemplate": {
                "ContainerSpec": {"Image": "busybox:1"},
                "Resources": {"Reservations": {"MemoryBytes": 4 << 30}},
            },
        }
        status, text, _ = await rig.exchange(role, "POST /skep/services/placement", [spec])
        return status, msgspec.json.decode(text)

    others = "services of other stacks"
    for role, named in (("operator:shop", others), (OPERATOR, "blog_db")):
        status, (plan,) = await planned(role, "shop_web", important)
        assert (status, plan["Preempted"]) == (200, [{"Name": named, "Tasks": 1}])
    for role, named in (("viewer:shop", others), ("viewer", "blog_db")):
        for path in ("tasks/t2", "services/shop_web"):
            _, text, _ = await rig.exchange(role, f"GET /skep/{path}/explain")
            assert f"tasks of {named}, priority 0, hold the resources on n1" in text
    for name, labels, refusal in (
        ("shop_new", important, "priority 10: only users with a role in the whole cluster"),
        ("blog_db", {STACK_LABEL: "blog"}, "belongs to the stack blog"),
        ("blog_db", SHOP, "begin with shop_"),
        ("shop_new", {}, "needs the label"),
    ):
        status, answer = await planned("operator:shop", name, labels)
        assert (status, refusal in answer["message"]) == (403, True), answer
    assert (await planned("operator:shop", "shop_new", SHOP))[0] == 200


async def test_the_last_output_of_a_failure_is_for_users_of_its_stack_only(rig: Rig) -> None:
    """The reason ends with it, so it has the same right as logs and ``Status.End``."""
    blog = labeled(a_service("blog_db"), {STACK_LABEL: "blog"})
    end = TaskEnd(cause="exit", lines=(KeptLine(text="s3cret"),))
    container = ContainerStatus(container_id="c1", exit_code=3)
    status = TaskStatus(state=TaskState.FAILED, end=end, container_status=container)
    failed = replace(a_task("t1", service=blog, node="n1", desired=TaskState.SHUTDOWN), status=status)
    restart = Restart(failures=1, delay=5, not_before=Timestamp("2026-01-01T10:00:00Z"))
    waits = a_task("t2", service=blog, node="n1", state=TaskState.READY, desired=TaskState.READY)
    for one in (a_node("n1"), blog, failed, replace(waits, restart=restart)):
        await rig.api.store.update(put, one)
    paths = ("/skep/services/blog_db/explain", "/skep/tasks/t2/explain", "/tasks/t2", "/tasks")
    for path in paths:
        for role, may_see in (("viewer:blog", True), ("viewer", True), ("viewer:shop", False)):
            _, text, _ = await rig.exchange(role, f"GET {path}")
            assert ('exit 3, last line \\"s3cret\\"' in text) is may_see, (path, role, text)
            assert may_see or "s3cret" not in text


async def test_a_request_has_the_rights_of_the_role_that_it_names_and_of_no_other(rig: Rig) -> None:
    spec = {"Name": "shop_web", "Labels": SHOP, "TaskTemplate": {"ContainerSpec": {"Image": "none"}}}
    other = {"Name": "web", "TaskTemplate": {"ContainerSpec": {"Image": "none"}}}
    for role, body, expected in (
        ("operator:shop", other, 403),
        ("viewer", spec, 403),
        ("root", spec, 400),
        ("operator:shop", spec, 201),
    ):
        status, text, _ = await rig.exchange("admin", "POST /services/create", body, {"X-Skep-Role": role})
        assert status == expected, text
    await asyncio.sleep(0)  # the entry is made when the response has been sent
    assert [one.status for one in rig.journal.entries] == [403, 403, 400, 201]


async def test_what_a_user_does_in_a_container_is_recorded_however_it_names_it(rig: Rig) -> None:
    service = await rig.api.store.update(put, a_service("web"))
    await rig.api.store.update(put, running("t1", service))
    for word in ("web", "web.1", "t1"):
        await rig.exchange(OPERATOR, f"POST /v1.41/skep/tasks/{word}/container/exec", {"Cmd": ["sh"]})
    assert [one.action for one in rig.journal.entries] == ["exec"] * 3


async def test_the_history_has_commands_and_paths_but_no_values(rig: Rig) -> None:
    service = await rig.api.store.update(put, a_service("web"))
    await rig.api.store.update(put, running("t1", service))
    admin, path = "admin", "POST /v1.41/skep/tasks/web.1/container/exec"
    await rig.exchange(OPERATOR, path, {"Cmd": ["sh", "-c", "PASSWORD=hunter2 psql"], "User": "0"})
    await rig.exchange(admin, path, {"Cmd": ["id"], "Privileged": True})
    await rig.exchange(admin, path, {"Cmd": ["echo", "x" * 1000]})
    for method in ("GET", "PUT"):
        await rig.exchange(OPERATOR, f"{method} /v1.41/skep/tasks/web.1/container/archive?path=/etc/passwd")
    exec_, archive = "exec in the container of task web.1: ", "archive in the container of task web.1: "
    messages = [one.message for one in rig.journal.entries]
    assert messages[0].startswith(f"{exec_}-u 0 sh -c ")
    assert "hunter2" not in messages[0]
    assert messages[1] == f"{exec_}--privileged id"
    assert len(messages[2]) < 400
    assert messages[2].endswith("x...")
    assert messages[3:] == [f"{archive}read /etc/passwd", f"{archive}write /etc/passwd"]


@pytest.mark.parametrize("request_", ["GET /services", "GET /services/none", "POST /session"])
async def test_a_connection_has_one_request_of_a_token_also_if_it_asks_for_an_upgrade(
    rig: Rig, request_: str
) -> None:
    """A proxy sends requests of several users on one connection."""
    upgrade = {"Connection": "Upgrade", "Upgrade": "h2c"}
    _, _, is_closed = await rig.exchange(OPERATOR, request_, headers=upgrade)
    assert is_closed


@pytest.mark.parametrize(
    ("label", "request_", "body", "refusal"),
    [
        ("", "POST {}/container/exec", {"Cmd": ["sh"]}, ""),
        ("", "POST {}/container/exec", {"Cmd": ["sh"], "User": "0", "Unknown": 1}, ""),
        ("", "POST {}/container/exec", {"Cmd": ["sh"], "Privileged": True}, "privileged command"),
        ("", "POST /v1.41{}/container/exec", {"Cmd": ["sh"], "privileged": True}, "privileged command"),
        ("user", "POST {}/container/exec", {"Cmd": ["sh"]}, ""),
        ("user", "POST {}/container/exec", {"Cmd": ["sh"], "User": "0"}, "skep.exec=user"),
        ("user", "PUT {}/container/archive?path=/", None, "skep.exec=user"),
        ("user", "GET {}/container/archive?path=/", None, ""),
        ("user", "POST {}/container/attach?stdin=1", None, ""),
        ("none", "POST {}/container/exec", {"Cmd": ["sh"]}, "skep.exec=none"),
        ("none", "POST {}/container/attach?stdin=1", None, "skep.exec=none"),
        ("none", "GET {}/container/archive?path=/", None, "skep.exec=none"),
        ("none", "POST {}/exec/e1/start", {}, "skep.exec=none"),
        ("none", "POST {}/container/wait", None, ""),
        ("none", "POST {}/port/80", None, ""),
    ],
)
async def test_what_a_user_below_administrator_brings_into_a_container(
    rig: Rig, label: str, request_: str, body: Any, refusal: str
) -> None:
    made = labeled(a_service("shop_x"), SHOP)
    labels = {"skep.exec": label} if label else {}
    container = replace(made.spec.task_template.container_spec or ContainerSpec(), labels=labels)
    template = replace(made.spec.task_template, container_spec=container)
    service = await rig.api.store.update(put, replace(made, spec=replace(made.spec, task_template=template)))
    await rig.api.store.update(put, running("t1", service))
    for role in (OPERATOR, "operator:shop", "admin"):
        headers = {"Upgrade": "tcp"} if "/port/" in request_ else {}
        status, text, _ = await rig.exchange(role, request_.format("/skep/tasks/t1"), body, headers)
        is_refused = bool(refusal) and role != "admin"
        assert status == (403 if is_refused else NO_NODE), (role, text)
        assert not is_refused or refusal in text


def a_spec(**container: Any) -> dict[str, Any]:
    return {
        "Name": "shop_web",
        "Labels": SHOP,
        "TaskTemplate": {"ContainerSpec": {"Image": "busybox", **container}},
    }


@pytest.mark.parametrize("role", [OPERATOR, "operator:shop"])
@pytest.mark.parametrize(
    ("path", "body", "refusal"),
    [
        ("services", a_spec(Ulimits=[{"Name": "rtprio", "Soft": 99, "Hard": 99}]), "ulimit rtprio=99:99"),
        ("services", a_spec(Healthcheck={"Interval": 10_000_000}), "health check interval below 1 s"),
        ("services", a_spec(Image="localhost:5000/x"), "registry on the machine itself (localhost:5000/x)"),
        ("services", a_spec(Labels={"skep.unknown": "1"}), "the label skep.unknown"),
        ("services", {**a_spec(), "Labels": SHOP | {"skep.autoscaling": "2"}}, "the label skep.autoscaling"),
        (
            "networks",
            {"Name": "shop_n", "Driver": "overlay", "Labels": SHOP | {"skep.allow-overlap": "true"}},
            "the label skep.allow-overlap",
        ),
        (
            "networks",
            {
                "Name": "shop_n",
                "Driver": "overlay",
                "Labels": SHOP,
                "IPAM": {"Driver": "default", "Config": [{"Subnet": "10.0.0.0/8"}]},
            },
            "a subnet wider than /16 (10.0.0.0/8)",
        ),
        ("networks", {"Name": "shop_n", "Driver": "bridge", "Labels": SHOP}, "no overlay"),
        ("secrets", {"Name": "shop_s", "Labels": SHOP | {"skep.x": "1"}, "Data": "eA=="}, "the label skep.x"),
        ("configs", {"Name": "shop_c", "Labels": SHOP | {"skep.x": "1"}, "Data": "eA=="}, "the label skep.x"),
    ],
)
async def test_what_reaches_beyond_a_stack_is_an_administrators(
    rig: Rig, role: str, path: str, body: Any, refusal: str
) -> None:
    status, text, _ = await rig.exchange(role, f"POST /{path}/create", body)
    assert status == 403, text
    assert f"{refusal}" in text
    assert "only administrators may give that" in text
    planned = {"Spec": body} if path == "services" else {key: body[key] for key in body if key != "Data"}
    checked = {path.capitalize(): [planned]}
    status, text, _ = await rig.exchange(role, "POST /skep/stacks/check", checked)
    assert (status, refusal in text) == (403, True), "a plan is refused in the same words"
    if "Driver" not in body or body["Driver"] == "overlay":
        assert (await rig.exchange("admin", f"POST /{path}/create", body))[0] == 201


async def test_a_plan_needs_the_rights_of_its_deploy(rig: Rig) -> None:
    theirs = labeled(a_service("blog_web"), {STACK_LABEL: "blog"})
    await rig.api.store.update(put, theirs)
    ours = {"Services": [{"Spec": a_spec()}]}
    moved = {"Services": [{"Spec": a_spec(), "ID": theirs.id, "Version": 1}]}
    for role, body, status in (
        ("operator:shop", ours, 200),
        (OPERATOR, ours, 200),
        ("viewer:shop", ours, 403),
        ("operator:blog", ours, 403),
        ("operator:shop", moved, 403),
        ("operator:shop", {**ours, "Removed": [theirs.id]}, 403),
        ("operator:shop", {"Networks": [{"Name": "blog_n", "Driver": "overlay", "Labels": SHOP}]}, 403),
    ):
        assert (await rig.exchange(role, "POST /skep/stacks/check", body))[0] == status, (role, body)
    assert not [one for one in rig.api.store.view().find(Service) if one.spec.name == "shop_web"]


async def test_no_operator_has_a_node_look_up_an_image_on_the_machine_itself() -> None:
    async def look_up(_request: web.Request) -> web.StreamResponse:
        return web.Response(text="{}")

    async with a_manager_api() as api:
        objects = ClusterObjects(api.store)
        served = runner(api_application([web.get("/distribution/{name:.+}/json", look_up)], objects=objects))
        await served.setup()
        rig = Rig(api, served.server, Recording(api))
        for name, status in (("localhost:5000/x", 403), ("127.1:6379%2Fx", 403), ("registry:5000/x", 200)):
            for version in ("", "/v1.41"):
                path = f"GET {version}/distribution/{name}/json"
                assert (await rig.exchange("operator:shop", path))[0] == status, name
                assert (await rig.exchange("admin", path))[0] == 200
        await served.cleanup()


async def test_the_data_of_an_operator_leaves_the_store_to_others(rig: Rig) -> None:
    data = base64.b64encode(b"x" * 900_000).decode()
    statuses = [
        (await rig.exchange("operator:shop", "POST /configs/create", body))[0]
        for body in ({"Name": f"shop_{number}", "Labels": SHOP, "Data": data} for number in range(75))
    ]
    assert statuses == [201] * 74 + [403]


async def test_an_operator_has_no_thousands_of_services_without_tasks(rig: Rig) -> None:
    for number in range(1_000):
        made = replace(a_service(f"shop_{number}", replicas=0), id=ServiceId(f"s{number}"))
        await rig.api.store.update(put, labeled(made, SHOP))
    status, text, _ = await rig.exchange("operator:shop", "POST /services/create", a_spec())
    assert (status, "has 1000 services and may have 1000 without a quota" in text) == (403, True), text
    present = rig.api.store.view().resolve(Service, "shop_7")
    update = f"POST /services/{present.id}/update?version={present.version.index}"
    assert (await rig.exchange("operator:shop", update, a_spec() | {"Name": "shop_7"}))[0] == 200


async def test_a_task_that_never_had_a_container_is_refused_with_its_state(rig: Rig) -> None:
    service = await rig.api.store.update(put, labeled(a_service("shop_web"), SHOP))
    task = a_task("t1", service=service, node="n1", state=TaskState.SHUTDOWN)
    await rig.api.store.update(put, replace(task, status=replace(task.status, container_status=None)))
    for request in ("GET {}/container/json", "GET {}/container/logs?stdout=1", "POST {}/container/exec"):
        body = {"Cmd": ["id"]} if request.startswith("POST") else None
        status, text, _ = await rig.exchange("operator:shop", request.format("/skep/tasks/t1"), body)
        assert (status, "task t1 is not running: it is shutdown" in text) == (400, True), text


async def test_an_operator_signals_the_containers_of_its_stack_and_no_others(rig: Rig) -> None:
    for name, stack in (("shop_web", "shop"), ("blog_web", "blog")):
        service = await rig.api.store.update(put, labeled(a_service(name), {STACK_LABEL: stack}))
        await rig.api.store.update(put, running(f"t{stack}", service))
    kill = "POST /skep/tasks/{}/container/kill?signal=HUP"
    assert (await rig.exchange("operator:shop", kill.format("tshop")))[0] == NO_NODE
    assert any(entry.message.endswith(": HUP") for entry in rig.journal.entries), rig.journal.entries
    for role, task in (("viewer:shop", "tshop"), ("viewer", "tshop")):
        assert (await rig.exchange(role, kill.format(task)))[0] == 403, role
    assert (await rig.exchange("operator:shop", kill.format("tblog")))[0] == 404


@pytest.mark.parametrize("role", ["viewer", "operator", "viewer:shop"])
async def test_no_join_token_is_shown_and_none_seems_to_be_empty(rig: Rig, role: str) -> None:
    status, text, _ = await rig.exchange(role, "GET /v1.41/swarm")
    assert status == 403
    assert "SWMTKN" not in text
    assert "only administrators may see join tokens" in text
