"""What containers of this node are confined by, as far as it is the machine's and not this program's."""

import asyncio
import shutil
from pathlib import Path

from skep.aio.clock import Clock
from skep.engine import apparmor, runc_flaws
from skep.node import requirements
from skep.node.conditions import Conditions

PROFILE_S = 30.0
"""Between two looks at the AppArmor profile."""


def check_isolation(runc: str, conditions: Conditions) -> tuple[str, ...]:
    """Sentences for ``docker info`` about ``runc``, a program or its name.  Blocks.

    An AppArmor profile that is missing is a condition: containers do not start without it.
    """
    conditions.reporter("apparmor")(apparmor.problem())
    program = shutil.which(runc) or ""
    output = requirements.version_output(program) or ""
    flaws = runc_flaws.warning(output, runc_flaws.changelog_of(Path(program)))
    return (flaws,) if flaws else ()


async def keep_profile(conditions: Conditions, clock: Clock) -> None:
    """Look until cancelled whether containers can be given their AppArmor profile, which others may load or unload."""
    report = conditions.reporter("apparmor")
    while True:
        await clock.sleep(PROFILE_S)
        report(await asyncio.to_thread(apparmor.problem))
