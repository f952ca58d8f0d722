"""``/skep/cluster/addresses`` on a manager: for administrators only, and what its warnings say."""

import msgspec

from skep.manager.routes.warnings import warnings_of
from skep.store.level import LEVEL
from tests.component.test_users_on_a_manager import Rig, rig

__all__ = ("rig",)


async def test_administrators_add_list_and_remove_addresses(rig: Rig) -> None:
    await rig.api.store.update(lambda tx: tx.raise_level(LEVEL))
    wanted = {"Address": "192.0.2.100/24"}
    for user in ("viewer", "operator"):
        assert (await rig.exchange(user, "POST /skep/cluster/addresses", wanted))[0] == 403
        assert (await rig.exchange(user, "GET /skep/cluster/addresses"))[0] == 403
        assert (await rig.exchange(user, "DELETE /skep/cluster/addresses/192.0.2.100"))[0] == 403
    assert (await rig.exchange("admin", "POST /skep/cluster/addresses", wanted))[0] == 201
    assert (await rig.exchange("admin", "POST /skep/cluster/addresses", wanted))[0] == 409
    status, text, _ = await rig.exchange("admin", "GET /skep/cluster/addresses")
    (shown,) = msgspec.json.decode(text)
    assert (status, shown["Address"], shown["State"]) == (200, "192.0.2.100/24", "unheld")
    assert shown["Reason"] == "no active node runs the front door: run skep door up"
    (warning,) = [one for one in await warnings_of(rig.api.store, 0) if "failover" in one]
    assert warning == "WARNING: 1 failover address is held by no node (skep cluster address)"
    assert (await rig.exchange("admin", "DELETE /skep/cluster/addresses/192.0.2.100"))[0] == 204
    assert (await rig.exchange("admin", "DELETE /skep/cluster/addresses/192.0.2.100"))[0] == 404
