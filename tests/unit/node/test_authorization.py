"""Of which stack the containers of a node are, for users with a role in single stacks."""

from pathlib import Path
from typing import cast

import pytest
from msgspec.structs import replace

from skep.api.permissions import STACK_LABEL
from skep.node.authorization import NodeObjects
from skep.node.routes.cluster_networks import ClusterNetworks
from tests.support.oci_rig import Machine, memory_engine, new_container


async def test_a_container_is_of_the_stack_of_its_service_whatever_its_labels_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = memory_engine(tmp_path, Machine(), monkeypatch)
    objects = NodeObjects(engine, cast("ClusterNetworks", None))
    claimed = {STACK_LABEL: "blog"}  # an image may have the label, too
    of_task = await engine.add(replace(new_container("web"), labels=claimed, stack="shop"))
    other = await engine.add(replace(new_container("tool"), labels=claimed))

    def stack(id: str) -> str:
        return objects.stack_of("container", {"Id": id, "Labels": claimed})

    assert (stack(of_task.id), stack(other.id), stack("removed")) == ("shop", "", "")
    assert objects.stack_of("volume", {"Name": "data", "Labels": claimed}) == "blog"
