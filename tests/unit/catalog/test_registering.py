"""How results of checks change the state of a registered service."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest

from sim.world.time import VirtualClock, VirtualLoop
from skep.aio.clock import Clock, SystemClock
from skep.api.client.requests import Requests
from skep.catalog.registering import RETRY_S, CheckRules, CheckState, ServiceRegistrar, after_check
from skep.errors import InvalidArgument, NotFound, PermissionDenied, SkepError, Unavailable
from skep.model.catalog import ServiceRegistration

RULES = CheckRules(rise=2, fall=3)


class Managers(Requests):
    """Managers that refuse each request with ``error``, or accept it without one."""

    def __init__(self, error: SkepError | None = None) -> None:
        self.error = error
        self.paths: list[str] = []
        self.on_request: Callable[[], object] = lambda: None

    async def request(self, method: str, path: str, **_: Any) -> Mapping[str, Any] | None:
        self.paths.append(f"{method} {path}")
        if self.error is not None:
            raise self.error
        self.on_request()
        if method == "DELETE":
            raise NotFound("there is none")
        return None


class LaterClock(SystemClock):
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


def a_registrar(
    managers: Managers,
    messages: list[str],
    why: str = "",
    name: str = "pg",
    checks: Sequence[str] = (),
    clock: Clock | None = None,
) -> ServiceRegistrar:
    """``checks`` has the reason of a failing check instead of ``why``, and may change."""

    async def check() -> str:
        return checks[0] if checks else why

    registration = ServiceRegistration(service=name, instance="one", address="192.0.2.7", port=5432)
    return ServiceRegistrar(
        managers, registration, check, CheckRules(rise=1, fall=1), clock or SystemClock(), messages.append
    )


def states(results: str) -> str:
    """The state after each result: ``+`` for a pass and up, ``-`` for a failure and down."""
    state, seen = CheckState(), ""
    for result in results:
        state = after_check(state, passed=result == "+", rules=RULES)
        seen += "+" if state.is_up else "-"
    return seen


def test_it_is_up_after_some_passes_and_down_after_some_failures_in_a_row() -> None:
    assert states("++---") == "-+++-"
    assert states("+-++") == "---+"
    assert states("++--+--") == "-++++++"


async def test_the_first_failing_check_is_reported_once() -> None:
    managers, messages = Managers(), list[str]()
    registrar = a_registrar(managers, messages, "192.0.2.7:5432: connection refused")
    await registrar.step()
    await registrar.step()
    assert messages == ["pg@one is not registered while its check fails: 192.0.2.7:5432: connection refused"]


async def test_a_registration_that_can_never_be_accepted_ends_with_the_reason() -> None:
    managers, messages = Managers(InvalidArgument("invalid name")), list[str]()
    with pytest.raises(InvalidArgument, match="invalid name"):
        await a_registrar(managers, messages).run()
    assert len(managers.paths) == 1, "nothing was registered, and nothing is removed"


async def test_a_name_stays_within_its_path() -> None:
    managers, messages = Managers(), list[str]()
    await a_registrar(managers, messages, name="a b/c").step()
    assert managers.paths == ["PUT /skep/registrations/a%20b%2Fc@one"]


async def test_a_refused_registration_is_tried_again_and_does_not_end_with_a_lease_that_it_never_had() -> (
    None
):
    managers, messages = Managers(PermissionDenied("ann may not")), list[str]()
    registrar = a_registrar(managers, messages)
    await registrar.step()
    await registrar._leave()
    assert messages == ["pg@one: the managers do not accept it, will retry: ann may not"]


async def test_a_registration_whose_answer_was_lost_is_removed_when_its_check_fails() -> None:
    managers, why, clock = Managers(), list[str](), LaterClock()
    registrar = a_registrar(managers, [], checks=why, clock=clock)
    for reasons, error in (
        (["down"], None),
        ([], Unavailable("no answer within 10 s")),
        (["down"], None),
    ):
        why[:], managers.error = reasons, error
        clock.now_s += RETRY_S[1]
        await registrar.step()
    deleted = "DELETE /skep/registrations/pg@one"
    assert managers.paths == [deleted, "PUT /skep/registrations/pg@one", deleted]


async def test_a_registration_whose_answer_was_lost_is_removed_at_the_end() -> None:
    managers, why = Managers(), ["down"]
    registrar = a_registrar(managers, [], checks=why)
    await registrar.step()
    why.clear()
    managers.error = Unavailable("no answer within 10 s")
    await registrar.step()
    managers.error = None
    running = asyncio.create_task(registrar.run())
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait([running])
    assert managers.paths[-1] == "DELETE /skep/registrations/pg@one"


def test_a_registration_is_renewed_between_checks_that_are_rarer_than_its_lease() -> None:
    loop = VirtualLoop()
    managers, registration = Managers(), ServiceRegistration(service="pg", instance="one", ttl=30)
    renewed_at: list[float] = []

    async def check() -> str:
        return ""

    async def live() -> None:
        rules = CheckRules(interval_s=100, rise=1)
        registrar = ServiceRegistrar(managers, registration, check, rules, VirtualClock(loop), print)
        running = asyncio.create_task(registrar.run())
        managers.on_request = lambda: renewed_at.append(loop.time())
        await asyncio.sleep(35)
        managers.error = Unavailable("no leader")
        await asyncio.sleep(20)
        managers.error = None
        await asyncio.sleep(300)
        running.cancel()
        await asyncio.wait([running])

    loop.run_until_complete(live())
    loop.close()
    assert max(later - before for before, later in pairwise(renewed_at)) < 30
    assert managers.paths[-1] == "DELETE /skep/registrations/pg@one"
    assert managers.paths.count("PUT /skep/registrations/pg@one") == 1


async def test_a_worker_that_refuses_a_registration_leads_to_the_managers() -> None:
    words = "This node is not a swarm manager. Worker nodes can't be used to view or modify cluster state."
    managers, messages = Managers(Unavailable(words)), list[str]()
    await a_registrar(managers, messages).step()
    assert messages[0].endswith("choose a manager with --host or --context")
