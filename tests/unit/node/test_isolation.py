"""What a node says of the AppArmor profile that confines its containers, and of their users."""

import asyncio

from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.engine.confinement.machine import MachineOptions
from skep.engine.containers.container import Container, ContainerState
from skep.node.host.conditions import Conditions
from skep.node.host.isolation import check_profile, keep_profile, other_users, watch_users
from tests.support.engine.oci_rig import QuickClock
from tests.unit.engine.test_mapped_users import USERS, a_container


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


def running(letter: str, *, is_mapped: bool) -> Container:
    return replace(a_container(letter, USERS if is_mapped else None), state=ContainerState.RUNNING)


def test_containers_of_another_mapping_are_named() -> None:
    containers = [running("b", is_mapped=False), running("a", is_mapped=True)]
    sentence = (
        "containers run with another userns-remap than this node has: {}: remove them and create them again"
    )
    assert other_users(containers, USERS) == sentence.format("b")
    assert other_users(containers, None) == sentence.format("a")
    assert other_users([replace(containers[0], state=ContainerState.EXITED)], USERS) == ""
    chosen = replace(containers[0].config, machine=MachineOptions(userns_mode="host"))
    assert other_users([replace(containers[0], config=chosen)], USERS) == ""
    many = [running(letter, is_mapped=False) for letter in "gfedcba"]
    assert other_users(many, USERS) == sentence.format("a, b, c, d, e and 2 more")


async def test_the_condition_about_users_ends_with_the_last_such_container() -> None:
    conditions, containers = Conditions(SystemClock()), [running("b", is_mapped=False)]
    watching = asyncio.create_task(watch_users(conditions, QuickClock(), lambda: containers, USERS))
    for is_present in (True, False):
        async with asyncio.timeout(30):
            while ("users" in conditions.present()) is not is_present:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        containers.clear()
    watching.cancel()
