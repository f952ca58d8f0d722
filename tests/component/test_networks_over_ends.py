"""The networks of plain containers that are connected, disconnected, ended and started in any order.

A container that does not run holds nothing, one that runs holds what its record says, and none frees another's.
"""

import asyncio
import errno
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skep.engine.containers.container import Container
from skep.engine.runtime.conmon import StartError
from skep.errors import SkepError, Unavailable
from skep.model.networks.sandbox import PublishedPort
from skep.model.service import PublishMode
from skep.model.values.ids import ContainerId
from tests.support.engine.container_networks import PORT, Lab, NetPorts
from tests.support.engine.oci_rig import Machine
from tests.support.file_faults import file_faults


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    async with Lab(tmp_path, Machine(), NetPorts()).running() as made:
        yield made


def nothing_is_held(lab: Lab) -> bool:
    return not any(lab.held().values())


def slow_reservations(lab: Lab) -> tuple[asyncio.Event, asyncio.Event]:
    """From now on a port is held (the first event is set then) before that is answered (once the second is set)."""
    is_held, is_answered = asyncio.Event(), asyncio.Event()

    async def slow() -> None:
        is_held.set()
        await is_answered.wait()

    lab.ports.steps["answer reservation"] = slow
    return is_held, is_answered


@pytest.mark.parametrize("address", ["10.5.0.10", ""])
async def test_a_container_that_was_connected_while_it_ran_ends_and_starts_again(
    lab: Lab, address: str
) -> None:
    id = await lab.run("c")
    await lab.connect(id, "front", address)
    await lab.end(id)
    assert nothing_is_held(lab)
    for _ in range(2):
        await lab.engine.start(id)
        assert lab.held() == lab.recorded()
        ((taken, owner),) = lab.held()["addresses"]
        assert (owner, taken if address else "") == (id, address)
        await lab.end(id)
    assert nothing_is_held(lab)


async def test_what_was_connected_later_goes_back_to_the_cluster(lab: Lab) -> None:
    id = await lab.run("c")
    await lab.connect(id, "over")
    assert set(lab.cluster.held.values()) == {id}
    await lab.end(id)
    assert nothing_is_held(lab)


async def test_the_end_of_a_container_that_has_left_its_port_leaves_it_to_the_next(lab: Lab) -> None:
    first = await lab.run("a")
    await lab.engine.networks.disconnect(first, "bridge")
    second = await lab.run("b")
    await lab.end(first)
    assert PORT in lab.ports.keys
    assert lab.held() == lab.recorded()
    await lab.end(second)
    assert nothing_is_held(lab)


async def test_a_start_that_fails_as_its_port_is_taken_leaves_it_to_its_holder(lab: Lab) -> None:
    first = await lab.run("a")
    await lab.end(first)
    await lab.run("b")
    with pytest.raises(SkepError, match="port is already allocated"):
        await lab.engine.start(first)
    assert lab.held() == lab.recorded()
    assert PORT in lab.ports.keys


@pytest.mark.parametrize("operation", ["connect", "disconnect", "bridge"])
async def test_an_end_in_the_middle_of_a_change_waits_for_it_and_frees_what_it_made(
    lab: Lab, operation: str
) -> None:
    id = await lab.run("c")
    if operation == "disconnect":
        await lab.connect(id, "front")
    if operation == "bridge":
        await lab.engine.networks.disconnect(id, "bridge")

    async def end() -> None:
        lab.machine.end(id)
        for _ in range(20):
            await asyncio.sleep(0)
        assert lab.engine.get(id).is_running, "its end is recorded after the change"

    lab.wires.during = end
    match operation:
        case "connect":
            await lab.connect(id, "front")
        case "disconnect":
            await lab.engine.networks.disconnect(id, "front")
        case _:
            await lab.connect(id, "bridge")
    await lab.engine.wait(id)
    assert nothing_is_held(lab)
    await lab.engine.start(id)
    expected = {"connect": (1, 1), "disconnect": (0, 1), "bridge": (0, 1)}[operation]
    assert (len(lab.held()["addresses"]), len(lab.held()["gateway"])) == expected
    assert lab.held() == lab.recorded()


async def test_a_change_whose_caller_leaves_is_over_before_the_next(lab: Lab) -> None:
    id = await lab.run("c")
    await lab.connect(id, "front")
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        begun.set()
        await go_on.wait()

    lab.wires.during = wait
    leaving = asyncio.create_task(lab.engine.networks.disconnect(id, "front"))
    await begun.wait()
    leaving.cancel()
    lab.machine.end(id)
    for _ in range(20):
        await asyncio.sleep(0)
    assert lab.engine.get(id).is_running
    go_on.set()
    await asyncio.wait([leaving])
    await lab.engine.wait(id)
    assert nothing_is_held(lab)


@pytest.mark.parametrize("operation", ["connect", "disconnect"])
async def test_a_change_whose_caller_leaves_once_it_is_made_is_that_of_the_next_run_too(
    lab: Lab, operation: str
) -> None:
    id = await lab.run("c")
    if operation == "disconnect":
        await lab.connect(id, "front")
    works = {"connect": lab.connect, "disconnect": lab.engine.networks.disconnect}
    leaving, loop = asyncio.create_task(works[operation](id, "front")), asyncio.get_running_loop()

    def leave(*_: object) -> None:
        loop.call_soon_threadsafe(leaving.cancel)

    lab.machine.steps["bundles.refresh_name_files"] = leave
    await asyncio.wait([leaving])
    assert leaving.cancelled()
    is_there = operation == "connect"
    for _ in range(2):
        assert len(lab.held()["addresses"]) == is_there
        assert lab.held() == lab.recorded()
        await lab.end(id)
        await lab.engine.start(id)


@pytest.mark.parametrize("operation", ["connect front", "disconnect front", "connect bridge"])
async def test_a_stop_in_the_middle_of_a_change_keeps_its_policy_from_a_restart(
    lab: Lab, operation: str
) -> None:
    verb, network = operation.split()
    id = await lab.run("c")
    changes = {"connect": lab.connect, "disconnect": lab.engine.networks.disconnect}
    if operation == "disconnect front":
        await lab.connect(id, "front")
    else:
        await lab.engine.networks.disconnect(id, "bridge")

    async def stop() -> None:
        lab.engine.note_stopped(id)

    lab.wires.during = stop
    await changes[verb](id, network)
    assert lab.wires.during is None
    plain = lab.engine.get(id).plain
    assert plain is not None
    assert plain.is_stopped


async def test_what_a_failed_change_could_not_undo_goes_with_the_end(lab: Lab) -> None:
    id = await lab.run("c")

    async def fail() -> None:
        async def fail_again() -> None:
            raise Unavailable("the kernel refuses that, too")

        lab.wires.during = fail_again
        raise Unavailable("the kernel refuses that")

    lab.wires.during = fail
    with pytest.raises(Unavailable):
        await lab.connect(id, "front")
    await lab.end(id)
    assert nothing_is_held(lab)


async def test_on_a_full_disk_every_network_of_an_ended_container_is_left(lab: Lab) -> None:
    first, second = await lab.run("a"), await lab.create("b", publishes=False)
    for network in ("front", "back", "over"):
        await lab.connect(first, network)
        await lab.connect(second, network)
    await lab.engine.start(second)  # the names of the others are written when one leaves

    with file_faults(lab.gateway.state.parent / "tables") as disk:
        disk.plan(0, errno.ENOSPC, sys.maxsize)
        await lab.end(first)
        assert disk.hits
    assert lab.held() == lab.recorded()


async def test_a_namespace_that_cannot_be_removed_keeps_no_address(lab: Lab) -> None:
    id = await lab.run("c")
    await lab.connect(id, "front")

    async def refuse(_: str) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    lab.spaces.destroy = refuse
    await lab.end(id)
    assert nothing_is_held(lab)


async def test_a_removal_that_meets_a_start_does_not_wait_for_it(lab: Lab) -> None:
    """The removal has its turn and waits for the end, whose record the start must not keep from it."""
    id = await lab.run("c")
    removing = asyncio.create_task(lab.engine.remove(id, force=True))
    with suppress(SkepError):
        await lab.engine.start(id)
    async with asyncio.timeout(20):
        await removing
    assert nothing_is_held(lab)


async def test_a_port_that_could_not_be_released_is_with_the_next_sweep(lab: Lab) -> None:
    id = await lab.run("c")
    lab.ports.fails.append(Unavailable("the net process is not reached"))
    await lab.end(id)
    assert lab.ports.keys
    await lab.gateway.disconnect(ContainerId("another"))
    assert lab.ports.keys
    assert id in lab.gateway.users(), "a sweep finds it"
    await lab.gateway.disconnect(id)
    assert nothing_is_held(lab)


@pytest.mark.parametrize("network", ["front", "over"])
async def test_a_container_that_could_not_be_cut_off_a_network_keeps_its_address(
    lab: Lab, network: str
) -> None:
    id = await lab.run("c")
    await lab.connect(id, network)
    await lab.engine.networks.disconnect(id, "bridge")
    lab.ports.fails.append(Unavailable("the net process is not reached"))
    with pytest.raises(Unavailable):
        await lab.engine.networks.disconnect(id, network)
    for part in ("addresses", "cluster", "wires"):
        assert lab.held()[part] == lab.recorded()[part], part
    await lab.engine.networks.disconnect(id, network)
    assert nothing_is_held(lab)


@pytest.mark.parametrize("step", ["remove", "choose"])
async def test_after_a_failed_move_of_the_bridge_containers_start_as_before(lab: Lab, step: str) -> None:
    async def refuse(*_: object) -> None:
        raise Unavailable("the kernel does not answer")

    if step == "remove":
        lab.home.steps["remove"] = refuse
    lab.gateway.steps["choose"] = refuse
    before = lab.gateway.subnet
    with pytest.raises(Unavailable):
        await lab.gateway.move(None)
    assert lab.gateway.subnet == before
    if step == "choose":
        assert lab.gateway.state.read_text().strip() == str(before), "as the next process has it"
    await lab.run("c")
    assert lab.held() == lab.recorded()


async def test_a_port_whose_reservation_was_never_answered_is_released_by_the_sweep(lab: Lab) -> None:
    async def unanswered() -> None:
        raise Unavailable("the net process does not answer")

    lab.ports.steps["answer reservation"] = unanswered
    with pytest.raises(SkepError, match="does not answer"):
        await lab.run("a")
    del lab.ports.steps["answer reservation"]
    assert PORT in lab.ports.keys
    await lab.engine.sweep()
    assert nothing_is_held(lab)
    await lab.run("b")
    await lab.engine.sweep()
    assert lab.held() == lab.recorded(), "what a container has is no leftover"


async def test_a_sweep_leaves_the_port_that_is_being_reserved(lab: Lab) -> None:
    is_held, is_answered = slow_reservations(lab)
    starting = asyncio.create_task(lab.run("a"))
    await is_held.wait()
    await lab.engine.sweep()
    is_answered.set()
    await starting
    assert lab.held() == lab.recorded()


async def test_a_sweep_leaves_ports_of_containers_that_could_not_be_taken_over_so_far(lab: Lab) -> None:
    id = await lab.run("a")
    live = {id: lab.engine.get(id).sandbox}

    async def unanswered() -> None:
        raise Unavailable("the net process does not answer")

    after = Lab(lab.gateway.state.parent, lab.machine, lab.ports)
    lab.ports.steps["list"] = unanswered
    with pytest.raises(Unavailable):
        await after.gateway.restore(live)
    del lab.ports.steps["list"]
    await after.gateway.sweep()
    assert PORT in lab.ports.keys


async def test_a_container_that_comes_as_the_bridge_moves_keeps_its_port(lab: Lab) -> None:
    moves, goes_on = asyncio.Event(), asyncio.Event()

    async def slow_move() -> None:
        lab.home.steps.pop("apply", None)
        moves.set()
        await goes_on.wait()

    is_held, is_answered = slow_reservations(lab)
    lab.home.steps["apply"] = slow_move
    lab.ports.steps["list"] = slow_move
    moving = asyncio.create_task(lab.gateway.move(None))
    await moves.wait()
    starting = asyncio.create_task(lab.run("a"))
    await is_held.wait()
    goes_on.set()
    await moving
    is_answered.set()
    await starting
    assert lab.held() == lab.recorded()


async def test_what_cannot_be_freed_for_one_container_keeps_no_sweep_from_the_others(lab: Lab) -> None:
    ids = sorted([await lab.create("a", publishes=False), await lab.create("b", publishes=False)])
    refused, disconnect = {*ids}, lab.gateway.disconnect

    async def disconnect_some(id: ContainerId) -> None:
        if id in refused:
            raise Unavailable("a namespace cannot be entered")
        await disconnect(id)

    lab.gateway.disconnect = disconnect_some  # type: ignore[method-assign]
    for id in ids:
        await lab.engine.start(id)
        await lab.end(id)
    assert lab.held()["gateway"] == ids
    refused.remove(ids[1])
    await lab.engine.sweep()
    assert lab.held()["gateway"] == ids[:1]


async def test_a_port_that_is_reserved_when_the_caller_leaves_is_released(lab: Lab) -> None:
    is_held, is_answered = slow_reservations(lab)
    port = PublishedPort(protocol="tcp", target_port=80, published_port=8080, publish_mode=PublishMode.HOST)
    leaving = asyncio.create_task(lab.gateway.connect(ContainerId("c"), Path("/none"), "eth0", [port]))
    await is_held.wait()
    leaving.cancel()
    await asyncio.sleep(0)
    is_answered.set()
    await asyncio.wait([leaving])
    assert leaving.cancelled()
    assert nothing_is_held(lab)


async def test_a_start_waits_for_the_sweep_of_what_the_last_run_left(lab: Lab) -> None:
    """Or the sweep would free what the next run has."""
    id, starts = await lab.run("c"), list[asyncio.Task[Container]]()
    lab.ports.fails.append(Unavailable("the net process is not reached"))
    await lab.end(id)
    locks = lab.engine.lifecycle.locks

    async def start_meanwhile() -> None:
        assert locks.is_held(id)
        starts.append(asyncio.create_task(lab.engine.start(id)))
        await asyncio.sleep(0)

    lab.ports.steps["release"] = start_meanwhile
    assert await lab.engine.sweep() == [id]
    del lab.ports.steps["release"]
    assert (await starts[0]).is_running
    assert await lab.engine.sweep() == []
    assert lab.held() == lab.recorded()


async def test_the_next_node_process_frees_what_the_record_has(tmp_path: Path) -> None:
    machine, ports = Machine(), NetPorts()
    async with Lab(tmp_path, machine, ports).running() as first:
        id = await first.run("c")
        await first.connect(id, "front", "10.5.0.10")
        await first.connect(id, "over")
        before = first.held()
    second = Lab(tmp_path, machine, ports)
    second.network.has_all = True
    async with second.running():
        held = second.held()
        assert {**held, "wires": before["wires"]} == before
        await second.connect(id, "back")
        await second.end(id)
        assert nothing_is_held(second)


OPERATIONS = st.sampled_from(
    [
        *("start", "failed start", "end"),
        *("connect front", "connect back", "connect over", "connect front 10.5.0.10", "connect bridge"),
        *("disconnect front", "disconnect back", "disconnect over", "disconnect bridge"),
    ]
)
STEPS = st.lists(st.tuples(OPERATIONS, st.sampled_from("ab"), st.booleans()), max_size=14)


async def perform(lab: Lab, operation: str, id: ContainerId, *, ends: bool) -> None:
    """``ends``: its process ends in the middle of a change."""

    async def end() -> None:
        lab.machine.end(id)
        for _ in range(3):
            await asyncio.sleep(0)

    def fail(verb: str, _: str) -> None:
        if verb == "create":
            raise StartError("runc refuses")

    runs = lab.engine.get(id).is_running
    verb, _, rest = operation.partition(" ")
    network, _, address = rest.partition(" ")
    lab.wires.during = end if ends and runs else None
    before, lab.machine.fault = lab.machine.fault, fail if verb == "failed" else lab.machine.fault
    with suppress(SkepError):
        match verb:
            case "start" | "failed":
                await lab.engine.start(id)
            case "connect":
                await lab.connect(id, network, address)
            case "disconnect":
                await lab.engine.networks.disconnect(id, network)
            case _ if runs:
                lab.machine.end(id)
    lab.machine.fault, lab.wires.during = before, None
    if runs and lab.machine.ended[id].is_set():
        await lab.engine.wait(id)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS)
def test_in_any_order_each_container_holds_what_its_record_says(steps: list[tuple[str, str, bool]]) -> None:
    async def life(directory: Path) -> None:
        async with asyncio.timeout(30), Lab(directory, Machine(), NetPorts()).running() as lab:
            ids = {name: await lab.create(name) for name in "ab"}
            for operation, name, ends in steps:
                await perform(lab, operation, ids[name], ends=ends)
                assert lab.held() == lab.recorded(), (operation, name)
            for id in ids.values():
                await lab.engine.remove(id, force=True)
            assert nothing_is_held(lab)

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(life(Path(directory)))
