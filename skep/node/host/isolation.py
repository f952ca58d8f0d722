"""Checks the part of the containers' isolation that the machine provides: the AppArmor profile."""

import asyncio
from collections.abc import Callable

from skep.aio.clock import Clock
from skep.engine.confinement import apparmor
from skep.model.node_reports.conditions import ConditionName
from skep.node.host.conditions import Conditions

PROFILE_S = 30.0
"""Seconds between checks of the AppArmor profile."""


def check_profile(conditions: Conditions, find_problem: Callable[[], str] = apparmor.problem) -> None:
    """Set a condition if the AppArmor profile is missing, because containers do not start without it.  Blocks."""
    conditions.reporter(ConditionName.APPARMOR)(find_problem())


async def keep_profile(
    conditions: Conditions, clock: Clock, find_problem: Callable[[], str] = apparmor.problem
) -> None:
    """Keep the condition ``apparmor`` current until cancelled: other programs may unload the profile."""
    report = conditions.reporter(ConditionName.APPARMOR)
    while True:
        await clock.sleep(PROFILE_S)
        report(await asyncio.to_thread(find_problem))
