"""How ``skep run`` waits for its task."""

import base64
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from sim.world.time import VirtualLoop
from skep.api.client.raw import RawClient
from skep.cli.apps.registry_logins import RegistryLogins
from skep.cli.apps.run import create, exit_code_of, run_spec, wait_task
from skep.errors import FailedPrecondition, NotFound, SkepError, Unavailable
from skep.manager.discovery.derive import service_on
from skep.model.service import Service, ServiceSpec
from skep.model.values.ids import ServiceId
from skep.stack.progress import UNPLACED_S
from tests.support.store.store_transactions import a_network

Answer = Callable[[float], Any]
"""Returns the document at a time, in seconds since the start.  An error is raised."""
PENDING = [{"ID": "t1", "Status": {"State": "pending", "Err": "no suitable node"}}]
COMPLETE = [{"ID": "t1", "Status": {"State": "complete"}}]
NO_NODE = {"Reason": "no node has 64 GiB of memory", "Problem": {"Kind": "no-node"}}


class Managers:
    """Managers that give ``answers`` by path."""

    def __init__(self, loop: VirtualLoop, answers: Mapping[str, Answer]) -> None:
        self._loop = loop
        self._answers = answers

    async def get(self, path: str, _query: Mapping[str, str] | None = None) -> Any:
        answer = self._answers[path](self._loop.time())
        if isinstance(answer, SkepError):
            raise answer
        return answer


def waited(answers: Mapping[str, Answer], *states: str) -> tuple[dict[str, Any], float]:
    """Return the task for which a run has waited, and for how many seconds."""
    loop = VirtualLoop()
    try:
        client = cast("RawClient", Managers(loop, answers))
        task = loop.run_until_complete(wait_task(client, "s1", frozenset(states or ("running", "complete"))))
        return task, loop.time()
    finally:
        loop.close()


@pytest.mark.parametrize("is_former", [False, True])
def test_a_run_gets_no_connections_of_its_service(*, is_former: bool) -> None:
    """Older clients name a service's networks beside its tasks."""
    networks = [{"Target": "front", "Aliases": ["web"], "DriverOpts": {"a": "b"}}]
    template = {"ContainerSpec": {"Image": "w", "Hostname": "web-{{.Task.Slot}}"}}
    spec = {"Name": "shop_web", "TaskTemplate": template | ({} if is_former else {"Networks": networks})}
    made = run_spec(spec | ({"Networks": networks} if is_former else {}), ["true"], name="shop_web-run-1")
    run = Service(id=ServiceId("r"), spec=msgspec.convert(made, ServiceSpec))
    network = a_network("front")
    entry = service_on(run, network, has_tasks=True)
    assert entry is not None
    assert (entry.name, entry.aliases) == ("shop_web-run-1", ())
    container = run.spec.task_template.container_spec
    assert container is not None
    assert container.hostname == ""
    (attached,) = run.spec.networks or run.spec.task_template.networks
    assert attached.driver_opts == {"a": "b"}


class Registrar:
    """Keeps the headers of the request that creates a service."""

    def __init__(self) -> None:
        self.headers: Mapping[str, str] = {}

    async def request(
        self, _method: str, _path: str, _body: Any, *, headers: Mapping[str, str]
    ) -> dict[str, Any]:
        self.headers = headers
        return {"ID": "s1"}


@pytest.mark.parametrize(
    ("config", "login"),
    [
        ({"auths": {"registry.example:5000": {"auth": base64.b64encode(b"me:secret").decode()}}}, "secret"),
        ({"auths": {"other.example": {"auth": base64.b64encode(b"me:secret").decode()}}}, ""),
        ({"credsStore": "not-installed"}, ""),
    ],
)
async def test_a_run_uses_the_login_for_its_registry(
    config: dict[str, Any], login: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(config))
    managers = Registrar()
    image = "registry.example:5000/app:1@sha256:" + 64 * "0"
    spec = {"TaskTemplate": {"ContainerSpec": {"Image": image}}}
    await create(cast("RawClient", managers), spec, RegistryLogins(tmp_path))
    sent = base64.urlsafe_b64decode(managers.headers.get("X-Registry-Auth", "")).decode()
    assert (login in sent, bool(sent)) == (True, bool(login))


def test_a_run_that_no_node_takes_ends_with_the_reason() -> None:
    answers: dict[str, Answer] = {
        "/tasks": lambda now: PENDING if now < 2 * UNPLACED_S else COMPLETE,
        "/skep/services/s1/explain": lambda _: NO_NODE,
    }
    with pytest.raises(Unavailable, match=r"no node has accepted a task for 6\d s: no node has 64 GiB"):
        waited(answers)


def test_a_run_that_gets_its_node_in_time_goes_on() -> None:
    answers: dict[str, Answer] = {
        "/tasks": lambda now: PENDING if now < UNPLACED_S / 2 else COMPLETE,
        "/skep/services/s1/explain": lambda _: NO_NODE,
    }
    assert waited(answers)[0] == COMPLETE[0]


def test_a_run_that_somebody_removes_ends() -> None:
    answers: dict[str, Answer] = {
        "/tasks": lambda now: PENDING if now < 5 else [],
        "/services/s1": lambda _: NotFound("service s1 not found"),
        "/skep/services/s1/explain": lambda _: NotFound("service s1 not found"),
    }
    with pytest.raises(FailedPrecondition, match="the run was removed before its command ended"):
        waited(answers)


def test_a_run_whose_node_is_drained_before_it_starts_goes_on_elsewhere() -> None:
    stopped = {"ID": "t0", "CreatedAt": "2026-01-01T00:00:00.5Z", "Status": {"State": "shutdown"}}
    pending, running = (
        {"ID": "t9", "CreatedAt": "2026-01-01T00:00:01Z", "Status": {"State": state}}
        for state in ("pending", "running")
    )
    answers: dict[str, Answer] = {
        "/tasks": lambda now: [stopped, pending if now < 2 else running],
        "/skep/services/s1/explain": lambda _: Unavailable("no leader"),
    }
    assert waited(answers, "running", "shutdown")[0] == running


def test_a_change_of_leader_does_not_end_a_run() -> None:
    answers: dict[str, Answer] = {
        "/tasks": lambda now: PENDING if now < 2 else Unavailable("no leader") if now < 20 else COMPLETE,
        "/skep/services/s1/explain": lambda _: Unavailable("no leader"),
    }
    task, seconds = waited(answers)
    assert (task, 20 <= seconds < 30) == (COMPLETE[0], True)


@pytest.mark.parametrize(
    ("err", "said"),
    [
        ("task: non-zero exit (127)", ""),
        ("starting container failed: exec: not found", "Error: its process could not be started\n"),
        ("task: non-zero exit (127): no memory", "Error: its process could not be started\n"),
    ],
)
async def test_a_command_that_did_not_end_by_itself_is_explained(
    err: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command that exists has its own output.  Another one has none."""
    answers = {"/skep/tasks/t1/explain": lambda _: {"Summary": "its process could not be started"}}
    client = cast("RawClient", Managers(VirtualLoop(), answers))
    status = {"State": "failed", "Err": err, "ContainerStatus": {"ExitCode": 127}}
    assert await exit_code_of(client, {"ID": "t1", "Status": status}) == 127
    assert capsys.readouterr().err == said
