"""Of which stack the containers of a node are, for users with a role in single stacks."""

import json
from pathlib import Path
from typing import cast

import pytest
from aiohttp import web
from msgspec.structs import replace

from skep.api.access.authorization import _filter
from skep.errors import InvalidArgument, NotFound
from skep.model.permissions.access import Identity, Origin, parse_binding
from skep.model.values.stacks import STACK_LABEL
from skep.node.authorization import NodeObjects
from skep.node.routes.cluster_networks import ClusterNetworks
from skep.node.visible_containers import visible_container
from tests.support.engine.oci_rig import Machine, memory_engine, new_container


async def test_a_container_is_of_the_stack_of_its_service_whatever_its_labels_say(tmp_path: Path) -> None:
    engine = memory_engine(tmp_path, Machine())
    async with engine.running():
        objects = NodeObjects(engine, cast("ClusterNetworks", None))
        claimed = {STACK_LABEL: "blog"}  # an image may have the label, too
        of_task = await engine.add(replace(new_container("web"), labels=claimed, stack="shop"))
        other = await engine.add(replace(new_container("tool"), labels=claimed))

        def stack(id: str) -> str:
            return objects.stack_of("container", {"Id": id, "Labels": claimed})

        assert (stack(of_task.id), stack(other.id), stack("removed")) == ("shop", "", "")
        assert objects.stack_of("volume", {"Name": "data", "Labels": claimed}) == "blog"


async def test_a_container_that_a_user_does_not_see_is_missing(tmp_path: Path) -> None:
    engine = memory_engine(tmp_path, Machine())
    async with engine.running():
        own = await engine.add(replace(new_container("web"), stack="shop"))
        other = await engine.add(replace(new_container("blog"), stack="blog"))
        plain = await engine.add(new_container("tool"))

        def found(role: str, word: str) -> str:
            identity = Identity(name="bob", origin=Origin.TOKEN, bindings=(parse_binding(role),))
            return visible_container(engine, identity, word).id

        assert found("viewer:shop", own.id[:12]) == found("viewer:shop", "web") == own.id
        assert [found("viewer", one.id) for one in (own, other, plain)] == [own.id, other.id, plain.id]
        for word in (other.id, other.id[:12], "blog", plain.id, "tool", "missing", ""):
            with pytest.raises(NotFound, match=f"^No such container: {word}$"):
                found("viewer:shop", word)


async def test_a_prefix_is_of_the_containers_that_a_user_sees(tmp_path: Path) -> None:
    """An ambiguous prefix must not say that another stack has a container with it."""
    engine = memory_engine(tmp_path, Machine())
    async with engine.running():
        shop = Identity(name="bob", origin=Origin.TOKEN, bindings=(parse_binding("viewer:shop"),))
        by_letter: dict[str, list[str]] = {}
        for number in range(17):  # so two begin with the same letter
            added = await engine.add(replace(new_container(f"blog{number}"), stack="blog"))
            by_letter.setdefault(added.id[0], []).append(added.id)
        letter = next(one for one, ids in by_letter.items() if len(ids) > 1)
        with pytest.raises(InvalidArgument, match="multiple IDs"):
            engine.get(letter)
        with pytest.raises(NotFound):
            visible_container(engine, shop, letter)


async def test_a_list_of_volumes_with_warnings_about_plug_ins_is_filtered() -> None:
    """A plug-in that does not answer is named by a text, which has no stack."""
    own, other = ({"Name": f"{stack}_data", "Labels": {STACK_LABEL: stack}} for stack in ("shop", "blog"))
    listed = {"Volumes": [own, other], "Warnings": ["list sshfs: connection refused"]}
    identity = Identity(name="bob", origin=Origin.TOKEN, bindings=(parse_binding("viewer:shop"),))
    objects = NodeObjects(None, cast("ClusterNetworks", None))
    found = await _filter(web.json_response(listed), identity, "volume", objects)
    assert isinstance(found, web.Response)
    assert isinstance(found.body, bytes)
    assert json.loads(found.body) == {"Volumes": [own], "Warnings": []}
