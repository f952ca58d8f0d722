"""A plain container that waits for its next start by its policy: Docker's state "restarting"."""

import asyncio
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from skep.api.errors import NotModified
from skep.api.http import server
from skep.api.http.versions import NEWEST
from skep.engine.api import containers
from skep.engine.api.streams import container_output
from skep.engine.containers.container import (
    Container,
    ContainerState,
    ExecConfig,
    NotRunning,
    PlainOptions,
    RestartPolicy,
    StillRunning,
    WaitCondition,
)
from skep.engine.containers.request import read_update
from skep.engine.containers.shared_namespaces import shared_by
from skep.engine.containers.updates import updated
from skep.engine.runtime.conmon import StartError
from skep.errors import AlreadyExists
from skep.model.values.ids import ContainerId
from skep.model.values.times import timestamp
from tests.support.engine.stub_engine import (
    ID,
    Body,
    StubEngine,
    a_container,
    on_virtual_time,
    restart_policies,
)

Run: TypeAlias = Callable[..., None]

ALWAYS = PlainOptions(restart=RestartPolicy(name="always"))
RUNNING = a_container(plain=ALWAYS)
RESTARTING = a_container(
    plain=ALWAYS, state=ContainerState.EXITED, process=None, exit_code=3, finished_at=timestamp(2)
)
"""As an earlier node process has left it."""
WAIT = f"Container {ID} is restarting, wait until the container is running"


@pytest.fixture
def simulated(tmp_path: Path) -> Run:
    """Run a test's body on virtual time, with an engine that has one container."""

    def run(body: Body, container: Container = RESTARTING, *, is_monitored: bool = False) -> None:
        """``is_monitored``: restart policies are carried out."""

        async def monitored(stubs: StubEngine) -> None:
            async with restart_policies(stubs):
                await asyncio.sleep(1)
                await body(stubs)

        on_virtual_time(monitored if is_monitored else body, tmp_path, container, within_s=7200)

    return run


async def asked(stubs: StubEngine, name: str, method: str = "POST", path: str = "/") -> web.StreamResponse:
    """What the handler ``name`` of the container ``c`` responds."""
    request = make_mocked_request(method, path, match_info={"id": "c"})
    request[server.VERSION_KEY] = NEWEST
    served = containers.ContainerRoutes(stubs.engine, stubs.clock)
    response: web.StreamResponse = await getattr(containers, name)(served, request)
    return response


async def shown(stubs: StubEngine, name: str, query: str = "") -> Any:
    response = await asked(stubs, name, "GET", f"/containers?{query}")
    assert isinstance(response, web.Response)
    assert isinstance(response.body, bytes)
    return json.loads(response.body)


def filters(**wanted: str) -> str:
    return f"filters={quote(json.dumps({name: [value] for name, value in wanted.items()}))}"


def refuse_starts(stubs: StubEngine) -> None:
    async def refuse(_: Container) -> None:
        raise StartError("exec: nosuch: executable file not found in $PATH")

    stubs.steps["runtime.create"] = refuse


# --- what is shown ------------------------------------------------------------------------------------------------


def test_it_is_shown_as_docker_shows_it(simulated: Run) -> None:
    async def body(stubs: StubEngine) -> None:
        (line,) = await shown(stubs, "list_containers")
        assert line["State"] == "restarting"
        assert line["Status"].startswith("Restarting (3) ")
        state = (await shown(stubs, "inspect_container"))["State"]
        assert (state["Status"], state["Running"], state["Restarting"]) == ("restarting", True, True)
        assert (state["Paused"], state["Pid"], state["ExitCode"]) == (False, 0, 3)
        assert await shown(stubs, "list_containers", filters(status="restarting"))
        assert not await shown(stubs, "list_containers", filters(status="exited"))
        assert not await shown(stubs, "list_containers", f"all=1&{filters(exited='3')}")

    simulated(body)


@pytest.mark.parametrize(
    "ended",
    [
        PlainOptions(),
        PlainOptions(restart=RestartPolicy(name="unless-stopped"), is_stopped=True),
        PlainOptions(restart=RestartPolicy(name="on-failure", attempts_max=2), restarts=2),
        None,
    ],
)
def test_one_that_nothing_starts_again_has_exited(simulated: Run, ended: PlainOptions | None) -> None:
    async def body(stubs: StubEngine) -> None:
        assert not await shown(stubs, "list_containers")
        (line,) = await shown(stubs, "list_containers", "all=1")
        assert line["State"] == "exited"
        assert line["Status"].startswith("Exited (3) ")
        assert (await shown(stubs, "inspect_container"))["State"]["Running"] is False

    simulated(body, msgspec.structs.replace(RESTARTING, plain=ended))


# --- what it is kept from, and what is kept from it -------------------------------------------------------------------


def test_it_is_not_pruned_and_removed_by_force_only(simulated: Run) -> None:
    async def body(stubs: StubEngine) -> None:
        await asked(stubs, "prune")
        expected = (
            '^cannot remove container "c": container is restarting: stop the container before removing or'
            " force remove$"
        )
        with pytest.raises(StillRunning, match=expected):
            await asked(stubs, "remove", "DELETE")
        assert stubs.engine.get(ID).is_restarting
        (user,) = containers.image_users(stubs.engine)
        assert user.is_running, "its image stays, too"
        await asked(stubs, "remove", "DELETE", "/?force=1")
        assert not stubs.engine.list()

    simulated(body)


def test_what_needs_a_process_is_told_to_wait_for_one(simulated: Run) -> None:
    async def body(stubs: StubEngine) -> None:
        for name in ("pause", "show_processes"):
            with pytest.raises(NotRunning, match=f"^{WAIT}$"):
                await asked(stubs, name)
        with pytest.raises(NotRunning, match=f"^{WAIT}$"):
            stubs.engine.execs.create(ID, ExecConfig(command=("true",)))
        other = PlainOptions(network_mode=f"container:{ID}")
        sharing = msgspec.structs.replace(RUNNING, id=ContainerId("d" * 64), plain=other)
        with pytest.raises(NotRunning, match=f"^{WAIT}$"):
            shared_by(sharing, stubs.engine.get, lambda _: Path())
        request = make_mocked_request("POST", "/?stream=1", match_info={"id": "c"})
        served = container_output.OutputRoutes(stubs.engine, stubs.clock)
        with pytest.raises(AlreadyExists, match=r"^container c is restarting, wait until the container is"):
            await container_output.attach(served, request)

    simulated(body)


def test_a_start_by_its_user_changes_nothing(simulated: Run) -> None:
    async def body(stubs: StubEngine) -> None:
        with pytest.raises(NotModified):
            await asked(stubs, "start")
        assert stubs.runtime.starts == 0

    simulated(body)


# --- how it ends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "events"), [("kill", ["die"]), ("stop", ["die", "stop"])])
def test_a_kill_or_a_stop_ends_its_restarting(simulated: Run, command: str, events: list[str]) -> None:
    async def body(stubs: StubEngine) -> None:
        await stubs.end(7)
        assert stubs.engine.get(ID).is_restarting
        assert (await asked(stubs, command)).status == 204
        assert stubs.engine.get(ID).status == "exited"
        await asyncio.sleep(3600)
        assert stubs.runtime.starts == 0
        assert [event.action for event in stubs.engine.events.recent(0)] == events
        with pytest.raises(NotRunning, match=r"^Cannot kill container: c: "):
            await asked(stubs, "kill")
        with pytest.raises(NotModified):
            await asked(stubs, "stop")

    simulated(body, RUNNING, is_monitored=True)


def test_a_signal_that_ends_no_container_leaves_it_restarting(simulated: Run) -> None:
    async def body(stubs: StubEngine) -> None:
        assert (await asked(stubs, "kill", path="/?signal=HUP")).status == 204
        assert stubs.engine.get(ID).is_restarting

    simulated(body)


@pytest.mark.parametrize("command", ["kill", "stop"])
def test_a_run_that_its_policy_is_starting_is_ended_too(simulated: Run, command: str) -> None:
    async def body(stubs: StubEngine) -> None:
        gate = asyncio.Event()
        stubs.steps["runtime.start"] = gate.wait
        await stubs.end(7)
        await asyncio.sleep(1)
        assert stubs.engine.get(ID).is_restarting
        ending = asyncio.create_task(asked(stubs, command))
        await asyncio.sleep(1)
        assert not ending.done()
        gate.set()
        await asyncio.sleep(1)
        events = [one for one in stubs.engine.events.recent(0) if one.type == "container"]
        assert [event.action for event in events] == ["die", "start", "kill"]
        await stubs.end(143)
        await ending
        await asyncio.sleep(3600)
        assert stubs.engine.get(ID).status == "exited"
        assert stubs.runtime.starts == 1

    simulated(body, RUNNING, is_monitored=True)


def test_it_is_restarting_until_its_last_attempt_runs_or_has_failed(simulated: Run) -> None:
    once = PlainOptions(restart=RestartPolicy(name="on-failure", attempts_max=1))

    async def body(stubs: StubEngine) -> None:
        states: list[str] = []

        async def refuse(_: Container) -> None:
            states.append(stubs.engine.get(ID).status)
            raise StartError("no such file")

        stubs.steps["runtime.create"] = refuse
        await stubs.end(7)
        await asyncio.sleep(3600)
        assert states == ["restarting"]
        ended = stubs.engine.get(ID)
        assert (ended.status, ended.plain and ended.plain.restarts) == ("exited", 1)

    simulated(body, a_container(plain=once), is_monitored=True)


@pytest.mark.parametrize("policy", ["always", "unless-stopped", "on-failure"])
def test_one_whose_user_could_not_start_it_has_exited(simulated: Run, policy: str) -> None:
    plain = PlainOptions(restart=RestartPolicy(name=policy), is_stopped=True)

    async def body(stubs: StubEngine) -> None:
        refuse_starts(stubs)
        with pytest.raises(StartError):
            await stubs.engine.start(ID)
        failed = stubs.engine.get(ID)
        assert (failed.status, failed.exit_code) == ("exited", 127)
        await asked(stubs, "prune")
        assert not stubs.engine.list()

    simulated(body, msgspec.structs.replace(RESTARTING, plain=plain))


@pytest.mark.parametrize("is_at_rest", [False, True])
def test_the_next_node_process_starts_it(simulated: Run, *, is_at_rest: bool) -> None:
    """Also where its policy was given after its end, or the start by its user failed."""

    async def body(stubs: StubEngine) -> None:
        assert stubs.engine.get(ID).status == "running"
        assert stubs.runtime.starts == 1

    simulated(body, msgspec.structs.replace(RESTARTING, is_at_rest=is_at_rest), is_monitored=True)


# --- another policy -----------------------------------------------------------------------------------------------


async def give_policy(stubs: StubEngine, name: str, attempts: int = 0) -> None:
    body = {"RestartPolicy": {"Name": name, "MaximumRetryCount": attempts}}
    await stubs.engine.update(ID, partial(updated, read_update(json.dumps(body).encode())))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (RestartPolicy(name="no"), ("always", 0)),
        (RestartPolicy(name="on-failure", attempts_max=1), ("on-failure", 5)),
    ],
)
def test_a_policy_that_an_ended_container_is_given_holds_from_its_next_end_on(
    simulated: Run, before: RestartPolicy, after: tuple[str, int]
) -> None:
    async def body(stubs: StubEngine) -> None:
        await stubs.end(7)
        await give_policy(stubs, *after)
        assert stubs.engine.get(ID).status == "exited"
        await stubs.engine.wait(ID)
        await asyncio.sleep(3600)
        assert stubs.runtime.starts == 0
        assert (await asked(stubs, "start")).status == 204
        await stubs.end(7)
        assert stubs.engine.get(ID).is_restarting
        await asyncio.sleep(1)
        assert (stubs.engine.get(ID).status, stubs.runtime.starts) == ("running", 2)

    simulated(body, a_container(plain=PlainOptions(restart=before, restarts=1)), is_monitored=True)


@pytest.mark.parametrize("name", ["no", "on-failure"])
def test_with_a_policy_that_does_not_want_it_it_is_not_started_any_more(simulated: Run, name: str) -> None:
    async def body(stubs: StubEngine) -> None:
        await stubs.end(0)
        assert stubs.engine.get(ID).is_restarting
        await give_policy(stubs, name)
        assert stubs.engine.get(ID).status == "exited"
        await asyncio.sleep(3600)
        assert (stubs.engine.get(ID).status, stubs.runtime.starts) == ("exited", 0)

    simulated(body, RUNNING, is_monitored=True)


def test_a_restart_by_its_user_that_fails_ends_its_restarting(simulated: Run) -> None:
    attempts: list[object] = []

    async def refuse(container: Container) -> None:
        attempts.append(container)
        raise StartError("exec: nosuch: executable file not found in $PATH")

    async def body(stubs: StubEngine) -> None:
        await stubs.end(7)
        stubs.steps["runtime.create"] = refuse
        with pytest.raises(StartError):
            await stubs.engine.stop_and_start(ID)
        assert stubs.engine.get(ID).status == "exited"
        await asyncio.sleep(3600)
        assert (stubs.engine.get(ID).status, len(attempts)) == ("exited", 1)

    simulated(body, RUNNING, is_monitored=True)


# --- waiting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", [WaitCondition.NOT_RUNNING, WaitCondition.NEXT_EXIT])
@pytest.mark.parametrize("is_stopped", [False, True])
def test_who_waits_gets_the_next_end_or_that_of_its_restarting(
    simulated: Run, condition: WaitCondition, *, is_stopped: bool
) -> None:
    async def body(stubs: StubEngine) -> None:
        first = asyncio.create_task(stubs.engine.wait(ID, condition))
        await stubs.end(7)
        assert (await first).exit_code == 7, "it ran when the wait began"
        second = asyncio.create_task(stubs.engine.wait(ID, condition))
        await asyncio.sleep(0)
        assert not second.done()
        if is_stopped:
            await stubs.engine.stop(ID)
            assert (await second).exit_code == 7
            return
        await asyncio.sleep(1)
        assert stubs.engine.get(ID).is_running
        assert not second.done()
        await stubs.end(8)
        assert (await second).exit_code == 8

    simulated(body, RUNNING, is_monitored=True)
