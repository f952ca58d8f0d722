"""Services take turns in writing their changes, and old changes are dropped when the service changes."""

from msgspec.structs import replace

from skep.manager.orchestrator.changes import FillSlot
from skep.manager.orchestrator.unwritten_changes import UnwrittenChanges
from skep.model.service import Service
from tests.support.builders import a_service

LARGE, SMALL = a_service("large", replicas=100), a_service("small", replicas=2)


def fills(service: Service) -> list[FillSlot]:
    return [FillSlot(service, slot) for slot in range(1, service.spec.replicas + 1)]


def decided(*services: Service) -> UnwrittenChanges:
    unwritten = UnwrittenChanges()
    for service in services:
        unwritten.add(service.id, service, fills(service))
    return unwritten


def taken(unwritten: UnwrittenChanges, limit: int) -> list[tuple[str, int]]:
    changes, _ = unwritten.take(limit)
    return [(id, change.slot) for id, change in changes if isinstance(change, FillSlot)]


def test_what_a_small_service_leaves_of_its_share_goes_to_the_large_one() -> None:
    unwritten = decided(LARGE, SMALL)
    first = taken(unwritten, 10)
    assert sorted(first) == [*(("large", slot) for slot in range(1, 9)), ("small", 1), ("small", 2)]
    assert taken(unwritten, 2) == [("large", 9), ("large", 10)], "the order of a decision is kept"


def test_of_more_services_than_changes_that_are_taken_each_has_its_turn() -> None:
    services = [a_service(f"s{number}", replicas=3) for number in range(4)]
    unwritten = decided(*services)
    turns = [id for _ in range(2) for id, _ in taken(unwritten, 2)]
    assert sorted(turns) == [service.id for service in services]


def test_a_service_that_is_due_meanwhile_is_decided_after_its_last_change() -> None:
    unwritten = decided(LARGE)
    assert unwritten.defers(LARGE.id, LARGE)
    assert unwritten.take(99)[1] == []
    assert unwritten.take(99)[1] == [LARGE.id]
    assert not unwritten
    assert not unwritten.defers(LARGE.id, LARGE)


def test_changes_for_an_earlier_state_of_the_service_are_dropped() -> None:
    unwritten = decided(LARGE, SMALL)
    assert not unwritten.defers(LARGE.id, replace(LARGE, spec=SMALL.spec))
    assert {id for id, _ in taken(unwritten, 10)} == {"small"}
