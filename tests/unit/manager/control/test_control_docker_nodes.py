"""What control refuses because of Docker Engines and their data plane."""

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.errors import FailedPrecondition, InvalidArgument
from skep.manager.control.networks import create_network
from skep.manager.control.nodes import update_node
from skep.model.networks.data_planes import PLANE_OPTION
from skep.model.node import NodeRole
from skep.model.values.ids import new_id
from skep.model.values.times import ZERO_TIME
from skep.store.memory import MemoryStore
from tests.support.builders import a_docker_node, an_overlay


async def test_a_plane_that_does_not_exist_is_refused_at_creation() -> None:
    store = MemoryStore(SystemClock())
    spec = an_overlay(subnet="", labels={PLANE_OPTION: "other"}).spec
    with pytest.raises(InvalidArgument, match=r"skep\.data-plane is docker or skep, not 'other'"):
        await store.update(create_network, spec, new_id=new_id, now=ZERO_TIME)


async def test_an_engine_cannot_be_promoted() -> None:
    store = MemoryStore(SystemClock())
    node = await store.update(lambda tx: tx.put(a_docker_node("d1")))
    requested = replace(node.spec, role=NodeRole.MANAGER)
    with pytest.raises(FailedPrecondition, match="node d1 is a Docker Engine and cannot manage this cluster"):
        await store.update(update_node, node.id, requested, node.version.index)
