"""Checks two parts of the containers' isolation that the machine provides: runc's version and the AppArmor profile."""

import asyncio
import shutil
from pathlib import Path

from skep.aio.clock import Clock
from skep.engine.confinement import apparmor
from skep.engine.runtime import runc_flaws
from skep.model.node_reports.conditions import ConditionName
from skep.node.host import requirements
from skep.node.host.conditions import Conditions

PROFILE_S = 30.0
"""Seconds between checks of the AppArmor profile."""


def check_isolation(runc: str, conditions: Conditions) -> tuple[str, ...]:
    """Return warnings for ``docker info`` about ``runc`` (a path or a name).  Blocks.

    Sets a condition if the AppArmor profile is missing, because containers do not start without it.
    """
    conditions.reporter(ConditionName.APPARMOR)(apparmor.problem())
    program = shutil.which(runc) or ""
    output = requirements.version_output(program) or ""
    flaws = runc_flaws.warning(output, runc_flaws.changelog_of(Path(program)))
    return (flaws,) if flaws else ()


async def keep_profile(conditions: Conditions, clock: Clock) -> None:
    """Keep the condition ``apparmor`` current until cancelled: other programs may unload the profile."""
    report = conditions.reporter(ConditionName.APPARMOR)
    while True:
        await clock.sleep(PROFILE_S)
        report(await asyncio.to_thread(apparmor.problem))
