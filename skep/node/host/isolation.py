"""Checks the containers' isolation: the machine's AppArmor profile, and the mapping of users."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Final

from skep.aio.clock import Clock
from skep.engine.confinement import apparmor
from skep.engine.containers.container import Container
from skep.model.node_reports.conditions import ConditionName
from skep.model.values.user_map import UserMap
from skep.node.host.conditions import Conditions

PROFILE_S = 30.0
"""Seconds between checks of the AppArmor profile."""
USERS_S = 30.0
"""Seconds between checks of the mapping of users.  It changes only when a container ends."""
_NAMED_MAX: Final = 5
"""Containers that the condition names, because its text is short."""


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


def other_users(containers: Iterable[Container], users: UserMap | None) -> str:
    """Return a sentence about running containers whose users are mapped otherwise than ``users``.  Empty without any.

    Containers that requested the machine's users do not count.
    """
    names = sorted(
        one.name
        for one in containers
        if one.is_running and one.config.machine.userns_mode != "host" and one.users != users
    )
    if not names:
        return ""
    more = f" and {len(names) - _NAMED_MAX} more" if len(names) > _NAMED_MAX else ""
    return (
        f"containers run with another userns-remap than this node has: {', '.join(names[:_NAMED_MAX])}{more}: "
        "remove them and create them again"
    )


async def watch_users(
    conditions: Conditions, clock: Clock, list_all: Callable[[], Iterable[Container]], users: UserMap | None
) -> None:
    """Keep the condition ``users`` current until cancelled."""
    report = conditions.reporter(ConditionName.USERS)
    while True:
        report(other_users(list_all(), users))
        await clock.sleep(USERS_S)
