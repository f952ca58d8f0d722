"""The output of commands that take a while, run against a simulated cluster on virtual time."""

import io
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import click
import msgspec
from msgspec.structs import replace

from sim.world.time import VirtualLoop
from skep.api.client.requests import Filters, Requests
from skep.cli.endpoint import HostOptions
from skep.cli.maintain.upgrade import carry_out, show_plan
from skep.cli.maintain.upgrade_means import Means
from skep.cli.output import Screen
from skep.cli.running import errors_shown
from skep.cli.see.events import line_of
from skep.cli.stack.stack_screens import ProgressPrinter, compared, lines_of, warn
from skep.cli.start.up import DesiredCluster, TargetMachine, make_cluster
from skep.manager.telemetry.events import messages_of
from skep.model.container import ContainerSpec
from skep.model.node import Node, NodeDescription, NodeState, NodeStatus
from skep.model.service import (
    ReplicatedService,
    Service,
    ServiceMode,
    ServiceSpec,
    TaskSpec,
    UpdateState,
    UpdateStatus,
)
from skep.model.task import ContainerStatus, Task, TaskState, TaskStatus
from skep.model.values.ids import NodeId, ServiceId, TaskId
from skep.model.values.times import SECOND_NS
from skep.stack.cluster_state import existing_of
from skep.stack.compose.conversion import stack_of
from skep.stack.compose.document import parse
from skep.stack.compose.reading import ProblemReport
from skep.stack.planning import plan_of
from skep.stack.project import Stack
from skep.stack.recording import carry_out as deploy
from skep.store.interface import Created, Event, Updated, View
from tests.support.managers.upgraded_clusters import Installing, UpgradedCluster

_NOW = 1_769_860_800
_AT = "2026-01-31T12:00:00Z"
_EXIT = "task: non-zero exit (3)"
_SHOP = """
services:
  web:
    image: shop/web:{version}
    deploy: {{replicas: {replicas}}}
    configs: [site]
  search: {{image: shop/search:3}}
configs:
  site: {{content: "greeting={version}"}}
"""


def _printed(work: Callable[[], Awaitable[Any]]) -> list[str]:
    """The lines of both streams, an error as the command shows it."""
    loop, screen = VirtualLoop(), io.StringIO()
    try:
        with redirect_stdout(screen), redirect_stderr(screen):
            try:
                with errors_shown():
                    loop.run_until_complete(work())
            except click.ClickException as error:
                error.show()
    finally:
        loop.close()
    return screen.getvalue().splitlines()


# --- skep stack deploy ---------------------------------------------------------------------------------------------


def shop(version: int, replicas: int) -> Stack:
    """The stack as a file makes it."""
    report = ProblemReport()
    text = _SHOP.format(version=version, replicas=replicas)
    made = stack_of(parse(text, "compose.yaml"), "shop", {}, report)
    report.raise_problems()
    return made


class _ShopCluster(Requests):
    """The cluster that a deploy of the shop talks to.  If ``fails`` is set, a failed task pauses the next update."""

    def __init__(self) -> None:
        self.fails = False
        self._objects: dict[str, list[dict[str, Any]]] = {"configs": [], "services": [], "networks": []}
        self._looks: dict[str, int] = {}
        self._seen: list[dict[str, Any]] = []

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        filters: Filters | None = None,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        match method, path.strip("/").split("/"):
            case "GET", ["tasks"]:
                if "_up-to-date" not in (filters or {}):  # else those of the same look
                    self._seen = self._tasks()
                return self._seen
            case "GET", [kind]:
                return self._objects.get(kind, [])
            case "GET", [kind, id]:
                return next(one for one in self._objects[kind] if id in (one["ID"], one["Spec"]["Name"]))
            case "POST", ["skep", "services", "changes"]:
                return [self._changed(one) for one in body]
            case "POST", ["skep", "stacks", "check"]:
                return []
            case "POST", ["networks", "create"]:
                self._objects["networks"].append({"Id": body["Name"], "Scope": "swarm", **body})
            case "POST", [kind, "create"]:
                self._objects[kind].append(self._object(body))
                return {"ID": body["Name"]}
            case "POST", ["configs", id, "update"]:
                (config,) = (one for one in self._objects["configs"] if one["ID"] == id)
                config["Spec"] = body
            case "DELETE", [kind, id]:
                self._objects[kind] = [one for one in self._objects[kind] if one["ID"] != id]
        return None

    @staticmethod
    def _object(spec: Any) -> dict[str, Any]:
        return {"ID": spec["Name"], "Version": {"Index": 1}, "CreatedAt": _AT, "Spec": spec}

    def _changed(self, change: Mapping[str, Any]) -> dict[str, str]:
        spec = msgspec.json.decode(bytes(change["Spec"]))
        others = [one for one in self._objects["services"] if one["ID"] != spec["Name"]]
        self._objects["services"] = [*others, self._object(spec)]
        self._looks.pop(spec["Name"], None)
        return {"Error": ""}

    def _tasks(self) -> list[dict[str, Any]]:
        """One more of a changed service runs at every look, or its first one fails and the update is paused."""
        return [task for service in self._objects["services"] for task in self._tasks_of(service)]

    def _tasks_of(self, service: dict[str, Any]) -> Iterator[dict[str, Any]]:
        looks = self._looks[service["ID"]] = self._looks.get(service["ID"], 0) + 1
        fails = self.fails and service["ID"] == "shop_web" and looks > 1
        if fails:
            reason = f"due to failure or early termination of task 5rtugg83s0k5e2d81lhsb36fe: {_EXIT}"
            service["UpdateStatus"] = {"State": "paused", "Message": f"update paused {reason}"}
        for slot in range(1, service["Spec"]["Mode"]["Replicated"]["Replicas"] + 1):
            state = {"State": "running" if slot < looks and not fails else "preparing"}
            if fails and slot == 1:
                state = {"State": "failed", "Err": _EXIT}
            yield {
                "ID": f"{service['ID']}.{slot}",
                "ServiceID": service["ID"],
                "Slot": slot,
                "Spec": service["Spec"]["TaskTemplate"],
                "DesiredState": "running",
                "Status": {"Timestamp": _AT, **state},
            }


async def _deploy(cluster: Requests, stack: Stack) -> None:
    plan = plan_of(stack, await existing_of(cluster, stack.name), images={}, prune=False)
    click.echo("\n".join(lines_of(plan)), err=True)
    await deploy(cluster, stack, plan, ProgressPrinter().show, 600.0, warn)


def compared_revisions() -> list[str]:
    """Return the output of ``skep stack diff`` for two versions of the shop."""
    return list(compared(shop(version=7, replicas=2), shop(version=8, replicas=3)).lines(Screen(columns=110)))


def deployed(*, fails: bool = False) -> list[str]:
    """Return the output of a deploy that updates a service."""
    cluster = _ShopCluster()
    _printed(lambda: _deploy(cluster, shop(version=7, replicas=2)))
    cluster.fails = fails
    return _printed(lambda: _deploy(cluster, shop(version=8, replicas=3)))


# --- skep up -------------------------------------------------------------------------------------------------------

_PREFLIGHT = """uid 0
kernel {kernel}
time {time:.0f}
os Debian GNU/Linux 12 (bookworm)
free {free}
systemd yes
apt yes
end yes
"""


class _MadeUpNode(Requests):
    """The API of a node that is in no cluster yet."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._state = "inactive"

    async def request(self, method: str, path: str, **options: Any) -> Any:
        match method, path:
            case "GET", "/info":
                swarm = {"LocalNodeState": self._state, "NodeID": self._name, "NodeAddr": "192.0.2.11"}
                return {"Swarm": swarm | {"ControlAvailable": True}}
            case "GET", "/swarm":
                return {"JoinTokens": {"Worker": "", "Manager": ""}}
            case "GET", "/nodes":
                return []
        self._state = "active"
        return None


class _MadeUpMachine(TargetMachine, frozen=True):
    """A machine that is reached without ssh."""

    node: _MadeUpNode
    kernel: str = "6.1.0-18-amd64"
    free_kib: int = 50 << 20

    async def run(self, words: Sequence[str], given: bytes, *, timeout_s: float) -> str:
        return _PREFLIGHT.format(kernel=self.kernel, time=time.time(), free=self.free_kib)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Requests]:  # type: ignore[override]
        yield self.node


def _machines(**of_the_last: Any) -> Iterator[TargetMachine]:
    for name in ("m1", "w1", "w2"):
        word = f"root@{name}"
        more = of_the_last if name == "w2" else {}
        yield _MadeUpMachine(word, TargetMachine.of(word).destination, _MadeUpNode(name), **more)


def made(**of_the_last: Any) -> list[str]:
    """Return the output of ``skep up`` for three machines."""
    with TemporaryDirectory() as folder:
        package = Path(folder) / "skep_0.2.0_amd64.deb"
        package.touch()
        return _printed(
            lambda: make_cluster(
                list(_machines(**of_the_last)), DesiredCluster(package=package), is_dry=False
            )
        )


# --- skep upgrade --------------------------------------------------------------------------------------------------


def _old_cluster() -> UpgradedCluster:
    return UpgradedCluster("m1", "m2", "m3", "w1", version="0.1.0", leader="m2", replicas=3)


def upgrade_planned() -> list[str]:
    """Return the output of ``skep upgrade --dry-run`` while a manager is down."""
    cluster = _old_cluster()
    cluster.nodes["m3"]["ManagerStatus"]["Reachability"] = "unreachable"
    host = cast("HostOptions", cluster)
    return _printed(lambda: show_plan(host, Means(version="0.2.0"), drains=True))


def upgraded(*, breaks: str = "") -> list[str]:
    """Return the output of ``skep upgrade``."""
    cluster = _old_cluster()
    means = Installing(
        version="0.2.0",
        command="true",
        rollback="true",
        cluster=cluster,
        breaks=frozenset({breaks} - {""}),
    )
    host = cast("HostOptions", cluster)
    return _printed(lambda: carry_out(host, means, drains=True, within_s=180.0, continues=False))


# --- skep events ---------------------------------------------------------------------------------------------------

_BOOM = Service(
    id=ServiceId("w2ldm4m3xhfkpx0i5n0cq9qvi"),
    spec=ServiceSpec(
        name="boom",
        task_template=TaskSpec(container_spec=ContainerSpec(image="shop/api:7")),
        mode=ServiceMode(replicated=ReplicatedService(replicas=2)),
    ),
)
_NODE = Node(id=NodeId("7me94608blfye704qouf525ku"), description=NodeDescription(hostname="w2"))


class _Names:
    """The part of a store view that task names need."""

    def lookup(self, kind: type[Any], id: str) -> Service | Node | None:
        return next((one for one in (_BOOM, _NODE) if one.id == id), None)

    def find(self, kind: type[Task], **wanted: str) -> Sequence[Task]:
        return ()


def _changes() -> Iterator[Event]:
    template = replace(_BOOM.spec.task_template, container_spec=ContainerSpec(image="shop/api:8"))
    updating = replace(
        _BOOM,
        spec=replace(_BOOM.spec, task_template=template),
        update_status=UpdateStatus(state=UpdateState.UPDATING),
    )
    yield Updated(_BOOM, updating)
    task = Task(
        id=TaskId("5rtugg83s0k5e2d81lhsb36fe"),
        service_id=_BOOM.id,
        slot=1,
        node_id=_NODE.id,
    )
    yield Created(task)
    runs = replace(task, status=TaskStatus(state=TaskState.RUNNING))
    yield Updated(task, runs)
    ended = ContainerStatus(container_id="c", exit_code=3)
    status = TaskStatus(state=TaskState.FAILED, err=_EXIT, container_status=ended)
    yield Updated(runs, replace(task, status=status))
    yield Updated(updating, replace(updating, update_status=UpdateStatus(state=UpdateState.PAUSED)))
    node = Node(id=NodeId("2g5yb0vcq3w1x8ok3kuv6wlqo"), description=NodeDescription(hostname="w1"))
    before, after = (replace(node, status=NodeStatus(state=one)) for one in (NodeState.READY, NodeState.DOWN))
    yield Updated(before, after)


def happened() -> list[str]:
    """Return the output of ``skep events`` for a failed update and a node that goes down."""
    view = cast("View", _Names())
    messages = (
        message
        for second, event in enumerate(_changes())
        for message in messages_of(event, (_NOW + second) * SECOND_NS, view)
    )
    return [line_of(msgspec.to_builtins(message)) for message in messages]
