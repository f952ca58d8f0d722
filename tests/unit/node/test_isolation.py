"""What a node says of the AppArmor profile that confines its containers."""

import asyncio

from skep.aio.clock import SystemClock
from skep.node.host.conditions import Conditions
from skep.node.host.isolation import check_profile, keep_profile
from tests.support.engine.oci_rig import QuickClock


def test_a_profile_that_cannot_be_loaded_is_a_condition() -> None:
    conditions = Conditions(SystemClock())
    check_profile(conditions, lambda: "AppArmor enabled on system but ...")
    assert conditions.present() == {"apparmor": "AppArmor enabled on system but ..."}


async def test_the_condition_ends_when_the_profile_is_loaded_and_begins_when_it_is_lost() -> None:
    conditions, problems = Conditions(SystemClock()), [""]
    looking = asyncio.create_task(keep_profile(conditions, QuickClock(), lambda: problems[-1]))
    for problem in ("could not be loaded", "", "lost"):
        problems.append(problem)
        async with asyncio.timeout(30):
            while conditions.present() != ({"apparmor": problem} if problem else {}):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
    looking.cancel()
