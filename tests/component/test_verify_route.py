"""``/skep/verify`` and ``/skep/rebalance`` on a manager: what they show and do, and for whom."""

import msgspec

from skep.manager.verify.records import ShownViolation, Verification, record
from tests.component.test_users_on_a_manager import Rig, rig
from tests.support.builders import a_node
from tests.support.store.store_transactions import put

__all__ = ("rig",)


async def test_a_viewer_of_the_cluster_checks_its_state_and_nothing_is_written(rig: Rig) -> None:
    await rig.api.store.update(put, a_node("n1"))
    revision = rig.api.store.view().revision
    status, text, _ = await rig.exchange("viewer", "GET /skep/verify")
    assert (status, msgspec.json.decode(text)["Count"]) == (200, 0), text
    assert rig.api.store.view().revision == revision
    assert (await rig.exchange("viewer:shop", "GET /skep/verify"))[0] == 403


async def test_what_the_leader_has_found_is_shown_without_a_check(rig: Rig) -> None:
    violation = ShownViolation(rule="slot", text="slot 1 of web", subjects=("web",))
    await rig.api.store.update(record, Verification(violations=(violation,), count=1), 5)
    status, text, _ = await rig.exchange("viewer", "GET /skep/verify?last=true")
    assert (status, msgspec.json.decode(text)["Violations"][0]["Text"]) == (200, "slot 1 of web")


async def test_a_viewer_sees_the_moves_and_an_operator_of_the_cluster_makes_them(rig: Rig) -> None:
    status, text, _ = await rig.exchange("viewer", "GET /skep/rebalance")
    assert (status, msgspec.json.decode(text)["Moves"]) == (200, []), text
    assert (await rig.exchange("viewer", "POST /skep/rebalance"))[0] == 403
    assert (await rig.exchange("operator:shop", "POST /skep/rebalance"))[0] == 403
    status, text, _ = await rig.exchange("operator", "POST /skep/rebalance")
    assert (status, msgspec.json.decode(text)["Run"]["Moved"]) == (200, 0), text
    assert (await rig.exchange("operator", "DELETE /skep/rebalance"))[0] == 204
    setting = {"AfterReturnS": 600}
    assert (await rig.exchange("operator", "PUT /skep/cluster/rebalance", setting))[0] == 403
    assert (await rig.exchange("admin", "PUT /skep/cluster/rebalance", setting))[0] == 204
