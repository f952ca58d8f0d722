"""``docker network connect`` and ``disconnect`` of a running container whose record cannot be written."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from msgspec.structs import replace

from skep.engine.containers.container import PlainOptions
from skep.model.networks.sandbox import (
    Endpoint,
    EndpointConfig,
    EndpointRequest,
    NetworkMode,
    Sandbox,
    SandboxConfig,
)
from skep.model.networks.tables import NetworkHead
from skep.model.values.ids import NetworkId
from tests.support.stub_engine import ID, StubEngine, StubNetwork, a_container, on_virtual_time


class Networks(StubNetwork):
    """A data plane that connects at once.  If ``fills``, the disk is full from then on."""

    def __init__(self, stubs: StubEngine, *, fills: bool) -> None:
        self._stubs = stubs
        self._fills = fills
        self.changes: list[str] = []

    async def connect(self, config: SandboxConfig, sandbox: Sandbox, request: EndpointRequest) -> Sandbox:
        self._change(f"connect {request.network}")
        return replace(sandbox, endpoints=(*sandbox.endpoints, an_endpoint(request.network)))

    async def disconnect(self, config: SandboxConfig, sandbox: Sandbox, network_id: str) -> Sandbox:
        self._change(f"disconnect {network_id}")
        return replace(sandbox, endpoints=())

    async def change_bridge(self, config: SandboxConfig, sandbox: Sandbox) -> Sandbox:
        self._change("bridge")
        return sandbox

    def _change(self, text: str) -> None:
        self.changes.append(text)
        self._stubs.bundles.is_full = self._fills


def an_endpoint(name: str, id: str = "") -> Endpoint:
    head = NetworkHead(id=NetworkId(id or name), name=name)
    return Endpoint(config=EndpointConfig(head=head, addresses=()), interface="", port="", mac_address="")


def networks_of(stubs: StubEngine, *, fills: bool, monkeypatch: pytest.MonkeyPatch) -> Networks:
    """Replace the data plane of an engine."""
    networks = Networks(stubs, fills=fills)
    monkeypatch.setattr(stubs.engine._lifecycle._effects, "_network", networks)
    return networks


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
def test_a_change_that_cannot_be_written_is_refused_before_it_is_made(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(stubs: StubEngine) -> None:
        networks = networks_of(stubs, fills=False, monkeypatch=monkeypatch)
        before = stubs.engine.get(ID)
        stubs.bundles.is_full = True
        with pytest.raises(OSError, match="No space left"):
            await change(stubs, text)
        assert networks.changes == []
        assert stubs.engine.get(ID) == before
        stubs.bundles.is_full = False

    on_virtual_time(body, tmp_path, RUNNING)


@pytest.mark.parametrize("text", CHANGES)
def test_a_change_fails_if_the_disk_fills_meanwhile_and_is_written_later(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in Docker, the request fails and the container is connected.  A crash may still lose that."""

    async def body(stubs: StubEngine) -> None:
        networks = networks_of(stubs, fills=True, monkeypatch=monkeypatch)
        with pytest.raises(OSError, match="No space left"):
            await change(stubs, text)
        assert len(networks.changes) == 1
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
    word: str, network_id: str, left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Source: moby, daemon/network.go (FindNetwork: full id, then full name)."""
    endpoints: Sequence[Endpoint] = (
        an_endpoint("a1", "c3"),
        an_endpoint("front", "a1"),
        an_endpoint("other", "b2"),
    )
    requests = tuple(EndpointRequest(network=one.network_name) for one in endpoints)

    async def body(stubs: StubEngine) -> None:
        networks = networks_of(stubs, fills=False, monkeypatch=monkeypatch)
        await stubs.engine.networks.disconnect(ID, word, network_id)
        assert networks.changes == [f"disconnect {left}"]

    plain = PlainOptions(mode=NetworkMode.NETWORKS, networks=requests)
    sandbox = Sandbox(netns="/nonexistent", endpoints=tuple(endpoints))
    on_virtual_time(body, tmp_path, replace(RUNNING, plain=plain, sandbox=sandbox))
