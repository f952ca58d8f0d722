"""The virtual addresses of one container: what is written, and when."""

from collections.abc import Mapping

import pytest

from skep.dataplane.plan.vip import VipBackends, VipPlan
from skep.dataplane.vip.virtual_addresses import VirtualAddresses
from skep.model.values.ids import NetworkId, ServiceId

NETWORK, WEB = NetworkId("front"), ServiceId("web")


async def test_a_change_that_could_not_be_planned_is_written_with_the_next_one() -> None:
    errors = [ValueError("a bug")]
    written: list[VipPlan] = []

    def backends_of(network: NetworkId) -> Mapping[ServiceId, VipBackends]:
        if errors:
            raise errors.pop()
        return {WEB: {"10.0.1.2": ("10.0.1.9",)}}

    async def write(plan: VipPlan) -> None:
        written.append(plan)

    addresses = VirtualAddresses(backends_of, write)
    with pytest.raises(ValueError, match="a bug"):
        await addresses.load(frozenset({(NETWORK, WEB)}))
    assert addresses.mark_changed(frozenset())
    await addresses.apply()
    assert len(written) == 1
    assert addresses.is_usable(frozenset({(NETWORK, WEB)}))
    assert not addresses.mark_changed(frozenset())
