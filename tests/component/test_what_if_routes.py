"""``/skep/what-if`` on a manager: what users with a role in one stack get, and what is written."""

import msgspec
from msgspec.structs import replace

from skep.model.node import SessionOwner
from skep.model.values.ids import SessionId
from tests.component.test_users_on_a_manager import SHOP, Rig, a_spec, labeled, rig, running
from tests.support.builders import a_node, a_service
from tests.support.store.store_transactions import put

__all__ = ("rig",)


async def with_two_stacks(rig: Rig) -> None:
    """Run a service of the stack shop, and one without a stack, on the node n1."""
    session = SessionOwner(session_id=SessionId("of-n1"))
    await rig.api.store.update(put, replace(a_node("n1"), session=session))
    for name, labels in (("shop_web", SHOP), ("hidden", {})):
        service = await rig.api.store.update(put, labeled(a_service(name), labels))
        await rig.api.store.update(put, running(f"of-{name}", service))


async def test_a_user_of_a_stack_gets_its_services_and_counts_of_others(rig: Rig) -> None:
    await with_two_stacks(rig)
    revision = rig.api.store.view().revision
    status, text, _ = await rig.exchange("viewer:shop", "GET /skep/what-if?lose=n1")
    assert status == 200, text
    answer = msgspec.json.decode(text)
    assert [one["Name"] for one in answer["Services"]] == ["shop_web"]
    assert (answer["OtherServices"], answer["Nodes"]) == (1, [])
    assert "hidden" not in text
    status, text, _ = await rig.exchange("viewer", "GET /skep/what-if?lose=n1")
    assert [one["Name"] for one in msgspec.json.decode(text)["Services"]] == ["hidden", "shop_web"]
    assert rig.api.store.view().revision == revision, "nothing was written"


async def test_services_of_other_stacks_cannot_be_supposed(rig: Rig) -> None:
    await with_two_stacks(rig)
    body = [a_spec() | {"Name": "hidden"}]
    assert (await rig.exchange("operator:shop", "POST /skep/what-if/services", body))[0] == 403
    assert (await rig.exchange("viewer", "POST /skep/what-if/services", body))[0] == 403
    status, text, _ = await rig.exchange("operator", "POST /skep/what-if/services", body)
    assert (status, "hidden" in text) == (200, True), text


async def test_a_request_without_one_change_is_refused(rig: Rig) -> None:
    await with_two_stacks(rig)
    for query in ("", "?lose=n1&drain=n1", "?lose=x=y"):
        status, text, _ = await rig.exchange("viewer", f"GET /skep/what-if{query}")
        assert status in (400, 404), text


async def test_the_survival_of_a_stack_is_for_users_who_see_it(rig: Rig) -> None:
    await with_two_stacks(rig)
    status, text, _ = await rig.exchange("viewer:shop", "GET /skep/what-if/survive?stack=shop")
    assert (status, msgspec.json.decode(text)["Services"]) == (200, ["shop_web"])
    assert "hidden" not in text
    for role, query in (("viewer:blog", "?stack=shop"), ("viewer", "?stack=none"), ("viewer", "")):
        status, text, _ = await rig.exchange(role, f"GET /skep/what-if/survive{query}")
        assert status in (400, 404), text
    body = [a_spec() | {"Name": "shop_new", "Labels": SHOP}]
    assert (await rig.exchange("viewer:shop", "POST /skep/what-if/survive", body))[0] == 403
    status, text, _ = await rig.exchange("operator:shop", "POST /skep/what-if/survive", body)
    assert (status, msgspec.json.decode(text)["Services"]) == (200, ["shop_new"])
