"""How many networks operators may create, and what thousands of them cost a manager's loop."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from random import Random
from typing import Any, cast

import pytest

from skep.aio.clock import SystemClock
from skep.manager.allocator.loop import Allocator
from skep.manager.allocator.subnets import is_allocated
from skep.model.network import IPAMConfig, Network
from skep.model.networks.overlays import vxlan_ids
from skep.model.values.ids import new_id
from skep.model.values.stacks import STACK_LABEL
from skep.store.interface import LoopStore
from skep.store.level import USERS
from tests.component.test_users_on_a_manager import OPERATOR, SHOP, Rig
from tests.component.test_users_on_a_manager import rig as rig
from tests.support.managers.counted_calls import counting_calls_of_callbacks


@asynccontextmanager
async def allocating(rig: Rig) -> AsyncIterator[None]:
    """The leader's allocator runs."""
    allocator = Allocator(cast("LoopStore", rig.api.store), SystemClock(), new_id, Random(1))
    async with asyncio.TaskGroup() as group:
        task = group.create_task(allocator.run())
        yield
        task.cancel()


async def all_allocated(rig: Rig) -> list[Network]:
    """The networks, once each has its subnet."""
    while True:
        networks = list(rig.api.store.view().find(Network))
        if all(map(is_allocated, networks)):
            return networks
        await asyncio.sleep(0.01)


def overlay(stack: str, number: int) -> Mapping[str, Any]:
    return {"Name": f"{stack}_n{number}", "Driver": "overlay", "Labels": {STACK_LABEL: stack}}


CALLS_MAX = 60_000
"""Function calls for which the loop may be held.  They take about 15 ms."""


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("many", [500, pytest.param(10_000, marks=pytest.mark.slow)])
async def test_of_ten_thousand_networks_of_one_operator_a_stack_gets_its_bound(rig: Rig, many: int) -> None:
    async with allocating(rig):
        with counting_calls_of_callbacks() as calls:
            for number in range(many):
                status, text, _ = await rig.exchange(
                    "operator:shop", "POST /networks/create", overlay("shop", number)
                )
                assert status == (201 if number < 100 else 403), text
        assert "the stack shop has 100 networks and may have 100 without a quota, 1 more wanted" in text
        assert (await rig.exchange(OPERATOR, "POST /networks/create", overlay("shop", many)))[0] == 403
        assert (await rig.exchange("operator:blog", "POST /networks/create", overlay("blog", 1)))[0] == 201
        # Nor does a refusal tell an operator what another stack has.
        refused = await rig.exchange("operator:blog", "POST /networks/create", overlay("shop", many))
        assert (refused[0], "100" in refused[1]) == (403, False)
        networks = await all_allocated(rig)
        await rig.api.store.update(lambda tx: tx.raise_level(USERS))
        assert (await rig.exchange("admin", "PUT /skep/stacks/shop/quota", {"Networks": 101}))[0] == 200
        for number, status in ((1, 201), (2, 403)):
            more = overlay("shop", many + number)
            assert (await rig.exchange("operator:shop", "POST /networks/create", more))[0] == status
    assert len([one for one in networks if one.spec.labels == SHOP]) == 100

    assert max(calls) < CALLS_MAX


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("many", [500, pytest.param(10_000, marks=pytest.mark.slow)])
async def test_ten_thousand_networks_of_the_clusters_operator_have_subnets_and_hold_nobody_up(
    rig: Rig, many: int
) -> None:
    async with allocating(rig):
        with counting_calls_of_callbacks() as calls:
            for number in range(many):
                body = overlay(f"s{number // 100}", number)
                status, text, _ = await rig.exchange(OPERATOR, "POST /networks/create", body)
                assert status == 201, text
        networks = [one for one in await all_allocated(rig) if STACK_LABEL in one.spec.labels]
        assert (await rig.exchange("operator:blog", "POST /networks/create", overlay("blog", 1)))[0] == 201
        (others,) = [one for one in await all_allocated(rig) if one.spec.labels == {STACK_LABEL: "blog"}]
    subnets = {one.subnet for network in networks for one in subnets_in(network)}
    ids = {id for network in networks for id in vxlan_ids(network.driver_state.options)}
    assert len(subnets) == len(ids) == many
    assert not subnets & {one.subnet for one in subnets_in(others)}

    assert max(calls) < CALLS_MAX


def subnets_in(network: Network) -> tuple[IPAMConfig, ...]:
    assert network.ipam_options is not None
    return network.ipam_options.configs
