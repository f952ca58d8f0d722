"""``docker network connect`` and ``disconnect`` of a running container whose record cannot be written."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from msgspec.structs import replace

from skep.engine.containers.container import ContainerState, PlainOptions
from skep.engine.runtime.conmon import StartError
from skep.errors import Unavailable
from skep.model.networks.sandbox import (
    Endpoint,
    EndpointRequest,
    NetworkMode,
    Sandbox,
)
from skep.model.values.times import ZERO_TIME
from tests.support.engine.stub_engine import (
    ID,
    StubEngine,
    a_container,
    an_endpoint,
    on_virtual_time,
)


def fill_disk_at_change(stubs: StubEngine) -> None:
    """Let the disk be full from the data plane's next change on."""

    def fill() -> None:
        stubs.bundles.is_full = True

    stubs.steps["network.change"] = fill


RUNNING = a_container(
    plain=PlainOptions(mode=NetworkMode.NETWORKS, networks=(EndpointRequest(network="front"),)),
    sandbox=Sandbox(netns="/nonexistent", endpoints=(an_endpoint("front"),)),
)
CHANGES = ("connect back", "disconnect front", "connect bridge")


async def change(stubs: StubEngine, text: str) -> None:
    kind, network = text.split()
    if kind == "connect":
        await stubs.engine.networks.connect(ID, EndpointRequest(network=network))
    else:
        await stubs.engine.networks.disconnect(ID, network)


@pytest.mark.parametrize("text", CHANGES)
def test_a_change_that_cannot_be_written_is_refused_before_it_is_made(text: str, tmp_path: Path) -> None:
    async def body(stubs: StubEngine) -> None:
        before = stubs.engine.get(ID)
        stubs.bundles.is_full = True
        with pytest.raises(OSError, match="No space left"):
            await change(stubs, text)
        assert stubs.network.changes == []
        assert stubs.engine.get(ID) == before
        stubs.bundles.is_full = False

    on_virtual_time(body, tmp_path, RUNNING)


@pytest.mark.parametrize("text", CHANGES)
def test_a_change_fails_if_the_disk_fills_meanwhile_and_is_written_later(text: str, tmp_path: Path) -> None:
    """As in Docker, the request fails and the container is connected.  A crash may still lose that."""

    async def body(stubs: StubEngine) -> None:
        fill_disk_at_change(stubs)
        with pytest.raises(OSError, match="No space left"):
            await change(stubs, text)
        assert len(stubs.network.changes) == 1
        changed = stubs.engine.get(ID)
        assert changed.plain != RUNNING.plain
        assert stubs.bundles.saved[ID].plain == RUNNING.plain
        assert stubs.engine.events.recent(0)[-1].action == text.split()[0]
        stubs.bundles.is_full = False
        await asyncio.sleep(10)
        assert stubs.bundles.saved[ID] == changed

    on_virtual_time(body, tmp_path, RUNNING)


@pytest.mark.parametrize(
    ("word", "network_id", "left"),
    [("a1", "a1", "a1"), ("a1", "", "a1"), ("other", "", "b2"), ("other", "b2", "b2")],
)
def test_a_network_with_this_id_is_left_before_one_with_this_name(
    word: str, network_id: str, left: str, tmp_path: Path
) -> None:
    """Source: moby, daemon/network.go (FindNetwork: full id, then full name)."""
    endpoints: Sequence[Endpoint] = (
        an_endpoint("a1", "c3"),
        an_endpoint("front", "a1"),
        an_endpoint("other", "b2"),
    )
    name_left = {"a1": "front", "b2": "other"}[left]
    requests = tuple(EndpointRequest(network=one) for one in ("c3", "front", "other"))

    async def body(stubs: StubEngine) -> None:
        await stubs.engine.networks.disconnect(ID, word, network_id)
        assert stubs.network.changes == [f"disconnect {left}"]
        changed = stubs.engine.get(ID)
        assert changed.plain is not None
        assert {one.network for one in changed.plain.networks} == {"c3", "front", "other"} - {name_left}

    plain = PlainOptions(mode=NetworkMode.NETWORKS, networks=requests)
    sandbox = Sandbox(netns="/nonexistent", endpoints=tuple(endpoints))
    on_virtual_time(body, tmp_path, replace(RUNNING, plain=plain, sandbox=sandbox))


@pytest.mark.parametrize("is_running", [True, False])
@pytest.mark.parametrize("word", ["front", "5d3f0c8b9a7e", "5d3f0c8b9a7e" + "0" * 52])
def test_a_network_that_was_connected_by_its_short_id_is_left_by_any_word(
    word: str, is_running: bool, tmp_path: Path
) -> None:
    """Otherwise the next start would connect it again.  ``5d`` is the name of another network."""
    id = "5d3f0c8b9a7e" + "0" * 52

    async def body(stubs: StubEngine) -> None:
        await stubs.engine.networks.disconnect(ID, word, id)
        changed = stubs.engine.get(ID)
        assert changed.plain is not None
        assert [one.network for one in changed.plain.networks] == ["5d"]

    requests = (EndpointRequest(network=id[:12]), EndpointRequest(network="5d"))
    container = replace(
        RUNNING,
        plain=PlainOptions(mode=NetworkMode.NETWORKS, networks=requests),
        sandbox=Sandbox(netns="/nonexistent", endpoints=(an_endpoint("front", id), an_endpoint("5d", "c3"))),
    )
    if not is_running:
        container = replace(container, state=ContainerState.EXITED, process=None, sandbox=None)
    on_virtual_time(body, tmp_path, container)


def test_a_change_adopts_a_run_that_earlier_processes_have_not_recorded(tmp_path: Path) -> None:
    """Otherwise the run would keep its old limits, name and networks, and its record would have the new ones."""
    is_seen = False

    async def status() -> None:
        if not is_seen:
            raise Unavailable("slow")

    def before(stubs: StubEngine) -> None:
        stubs.network.has_all = True
        stubs.steps["runtime.status"] = status

    async def body(stubs: StubEngine) -> None:
        nonlocal is_seen
        with pytest.raises(Unavailable):
            await change(stubs, "connect back")
        assert not stubs.engine.get(ID).is_running
        is_seen = True
        await change(stubs, "connect back")
        assert stubs.network.changes == ["connect back"]
        assert stubs.engine.get(ID).is_running

    started = replace(RUNNING, state=ContainerState.CREATED, started_at=ZERO_TIME)
    on_virtual_time(body, tmp_path, started, before=before)


def test_a_disk_that_is_full_is_named_in_the_systems_words(tmp_path: Path) -> None:
    async def body(stubs: StubEngine) -> None:
        stubs.bundles.is_full = True
        with pytest.raises(
            StartError, match="cannot prepare the container: no space left on device: unknown"
        ):
            await stubs.engine.lifecycle.prepare(stubs.engine.get(ID))

    on_virtual_time(body, tmp_path, a_container(state=ContainerState.CREATED, process=None))
