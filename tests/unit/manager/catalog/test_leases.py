"""When the lease of a registration is over."""

from skep.manager.catalog.loop import LeaseTimes
from skep.manager.catalog.registrations import RegistrationRecord
from skep.model.catalog import ServiceRegistration


def a_record(instance: str, renewals: int, ttl: int = 10) -> RegistrationRecord:
    registration = ServiceRegistration(
        service="db", instance=instance, address="192.0.2.7", port=5432, ttl=ttl
    )
    return RegistrationRecord(registration=registration, renewals=renewals)


def test_a_lease_without_renewals_is_over_after_its_time() -> None:
    times = LeaseTimes()
    records = [a_record("a", 1), a_record("b", 1, ttl=30)]
    assert list(times.expired(records, 100.0)) == []
    assert list(times.expired(records, 110.0)) == []
    assert list(times.expired(records, 110.5)) == [("db@a", 1)]


def test_a_renewal_begins_the_lease_again() -> None:
    times = LeaseTimes()
    assert list(times.expired([a_record("a", 1)], 100.0)) == []
    assert list(times.expired([a_record("a", 2)], 109.0)) == []
    assert list(times.expired([a_record("a", 2)], 118.0)) == []
    assert list(times.expired([a_record("a", 2)], 119.5)) == [("db@a", 2)]


def test_a_new_leader_begins_every_lease_again() -> None:
    records = [a_record("a", 7)]
    earlier = LeaseTimes()
    assert list(earlier.expired(records, 100.0)) == []
    assert list(LeaseTimes().expired(records, 1_000.0)) == []


def test_a_registration_that_returns_has_a_new_lease() -> None:
    times = LeaseTimes()
    assert list(times.expired([a_record("a", 1)], 100.0)) == []
    assert list(times.expired([], 105.0)) == []
    assert times.is_empty
    assert list(times.expired([a_record("a", 1)], 115.0)) == []
