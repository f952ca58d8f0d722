from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.engine.containers.container import Health, HealthStatus, Probe
from skep.engine.containers.health import (
    LOG_MAX,
    after_probe,
    command,
    initial,
    interval_s,
    merged,
    timeout_s,
)
from skep.model.container import HealthConfig
from skep.model.values.times import SECOND_NS, ZERO_TIME

STARTING, HEALTHY, UNHEALTHY = HealthStatus


def a_check(**fields: int) -> HealthConfig:
    """Times in seconds."""
    times = {name: value if name == "retries" else value * SECOND_NS for name, value in fields.items()}
    return HealthConfig(test=("CMD-SHELL", "true"), **times)


def a_probe(exit_code: int) -> Probe:
    return Probe(start=ZERO_TIME, end=ZERO_TIME, exit_code=exit_code, output="")


def after_all(config: HealthConfig, exit_codes: Iterable[int], *, began_s: float = 100.0) -> Health:
    health = Health()
    for exit_code in exit_codes:
        health = after_probe(config, health, a_probe(exit_code), began_s)
    return health


@pytest.mark.parametrize(
    ("test", "executed"),
    [
        (("CMD", "curl", "-f", "localhost"), ("curl", "-f", "localhost")),
        (("CMD-SHELL", "a && b"), ("/bin/sh", "-c", "a && b")),
        (("NONE",), ()),
        ((), ()),
        (("SOMETHING", "else"), ()),
    ],
)
def test_a_probe_is_a_command_or_a_line_of_shell(test, executed):
    config = HealthConfig(test=test)
    assert command(config) == executed
    assert initial(config) == (Health() if executed else None)


def test_what_the_service_leaves_open_is_the_images():
    image = HealthConfig(test=("CMD", "probe"), interval=7, retries=5)
    assert merged(HealthConfig(interval=9), image) == HealthConfig(
        test=("CMD", "probe"), interval=9, retries=5
    )
    assert merged(None, image) == image
    assert command(merged(HealthConfig(test=("NONE",)), image)) == ()


def test_an_image_cannot_have_a_service_probed_more_often_than_its_users_can():
    image = HealthConfig(test=("CMD", "true"), interval=SECOND_NS // 10, start_interval=1_000_000)
    least = SECOND_NS
    found = merged(None, image, image_interval_ns_min=least)
    assert found is not None
    assert (found.interval, found.start_interval) == (least, least)
    own = HealthConfig(interval=SECOND_NS // 2)  # which only an administrator may give
    found = merged(own, image, image_interval_ns_min=least)
    assert found is not None
    assert (found.interval, found.start_interval) == (SECOND_NS // 2, least)
    assert merged(None, HealthConfig(), image_interval_ns_min=least) == HealthConfig()
    assert merged(None, image) == image


def test_dockers_defaults_hold_for_what_is_not_given():
    assert interval_s(a_check(), Health(), 0.0) == 30
    assert timeout_s(a_check()) == 30
    assert after_all(a_check(), [1, 1]).status is STARTING
    assert after_all(a_check(), [1, 1, 1]).status is UNHEALTHY


def test_one_success_makes_healthy_and_ends_the_streak():
    assert after_all(a_check(retries=2), [1, 0]) == Health(status=HEALTHY, log=(a_probe(1), a_probe(0)))
    assert after_all(a_check(retries=2), [0, 1]).status is HEALTHY
    assert after_all(a_check(retries=2), [0, 1, -1]).status is UNHEALTHY
    assert after_all(a_check(retries=2), [1, 1, 0]).status is HEALTHY


def test_failures_in_the_start_period_do_not_count():
    config = a_check(retries=1, start_period=10)
    assert after_all(config, [1, 1, 1], began_s=9.9).failing_streak == 0
    assert after_all(config, [1], began_s=10.0).status is UNHEALTHY


def test_the_start_period_ends_with_the_first_healthy_probe():
    assert after_all(a_check(retries=1, start_period=10), [0, 1], began_s=1.0).status is UNHEALTHY


def test_a_starting_container_is_probed_more_often():
    config = a_check(interval=20, start_period=10, start_interval=1)
    assert interval_s(config, Health(), 3.0) == 1
    assert interval_s(config, Health(), 10.0) == 20
    assert interval_s(config, Health(status=HEALTHY), 3.0) == 20


@given(st.lists(st.integers(-1, 2), max_size=20), st.integers(1, 4))
def test_the_log_is_bounded_and_the_streak_is_the_failures_since_the_last_success(codes, retries):
    health = after_all(a_check(retries=retries), codes)
    streak = next((length for length, code in enumerate(reversed(codes)) if code == 0), len(codes))
    assert health.failing_streak == streak
    assert [probe.exit_code for probe in health.log] == codes[-LOG_MAX:]
    assert (health.status is UNHEALTHY) == (streak >= retries)
