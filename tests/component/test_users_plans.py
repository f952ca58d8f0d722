"""Plans of deploys by users below administrator: what a manager spends on them, and what it tells of other stacks."""

import asyncio
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

from skep.api.permissions import STACK_LABEL
from skep.model.ids import ConfigId
from skep.model.secret import Config, ConfigSpec
from tests.component.test_users_on_a_manager import OPERATOR, SHOP, Rig, rig
from tests.support.store_transactions import put

__all__ = ("rig",)


async def test_a_plan_of_an_operator_stops_no_other_request(rig: Rig) -> None:
    for number in range(1_500):
        spec = ConfigSpec(name=f"blog_{number}", labels={STACK_LABEL: "blog"}, data=b"x")
        await rig.api.store.update(put, Config(id=ConfigId(f"c{number}"), spec=spec))
    scans: Counter[str] = Counter()
    table = rig.api.store.view().table_by_type[Config]  # type: ignore[attr-defined]
    found_ids = table.found_ids

    def counted(by: Mapping[str, str]) -> Any:
        scans["all" if not by else "by " + next(iter(by))] += 1
        return found_ids(by)

    table.found_ids = counted
    planned = [{"Name": f"shop_{number}", "Labels": SHOP, "DataBytes": 3} for number in range(501)]
    for role in (OPERATOR, "operator:shop"):
        status, text, _ = await rig.exchange(role, "POST /skep/stacks/check", {"Configs": planned[:500]})
        assert (status, text.strip()) == (200, "[]")
        status, text, _ = await rig.exchange(role, "POST /skep/stacks/check", {"Configs": planned})
        assert (status, "only administrators may have more than 500 checked" in text) == (500, True), text
    assert scans["all"] <= 2, "of the stacks' names, once a request"
    assert scans["by stack"] <= 2, scans
    assert (await rig.exchange("admin", "POST /skep/stacks/check", {"Configs": planned}))[0] == 200


async def test_a_plan_waits_for_a_slot_before_its_rights_are_computed(rig: Rig) -> None:
    body = {"Configs": [{"Name": "shop_c", "Labels": SHOP, "DataBytes": 3}]}
    async with rig.api.checks.taken(), rig.api.checks.taken():
        with pytest.raises(TimeoutError):
            # It has no right to this: but for the slot, the refusal would come at once.
            await asyncio.wait_for(rig.exchange("operator:blog", "POST /skep/stacks/check", body), 0.2)
    assert (await rig.exchange("operator:blog", "POST /skep/stacks/check", body))[0] == 403
