"""Why a container ended, from its record."""

import pytest
from msgspec.structs import replace

from skep.agent.executor.ends import end_of, failed_check
from skep.engine.containers.container import (
    Container,
    ContainerConfig,
    ContainerState,
    Health,
    HealthStatus,
    Interruption,
    Probe,
)
from skep.model.container import HealthConfig
from skep.model.task_end import TaskEnd, signal_of
from skep.model.values.ids import ContainerId
from skep.model.values.times import SECOND_NS, ZERO_TIME, timestamp

CONFIG = ContainerConfig(path="sh", stop_grace_ns=2 * SECOND_NS)
ENDED = Container(
    id=ContainerId("c1"),
    name="web.1",
    image="i",
    image_id="sha256:1",
    config=CONFIG,
    state=ContainerState.EXITED,
    started_at=timestamp(1),
)


def probe(exit_code: int, output: str) -> Probe:
    return Probe(start=timestamp(1), end=timestamp(2), exit_code=exit_code, output=output)


SICK = replace(
    ENDED,
    exit_code=143,
    config=replace(CONFIG, healthcheck=HealthConfig(test=("CMD", "test", "-s", "/tmp/x"), retries=2)),
    health=Health(
        status=HealthStatus.UNHEALTHY, failing_streak=2, log=(probe(0, "fine"), probe(1, "a"), probe(7, "b"))
    ),
)


@pytest.mark.parametrize(
    ("container", "stopping_s", "end"),
    [
        (ENDED, None, TaskEnd(cause="exit")),
        (replace(ENDED, exit_code=3), None, TaskEnd(cause="exit")),
        (replace(ENDED, exit_code=139), None, TaskEnd(cause="signal", signal="SIGSEGV")),
        (replace(ENDED, exit_code=255), None, TaskEnd(cause="exit")),
        (
            replace(ENDED, exit_code=137, oom_killed=True),
            None,
            TaskEnd(cause="out-of-memory", signal="SIGKILL"),
        ),
        (replace(ENDED, exit_code=143), 2.1, None),
        (ENDED, 2.1, None),
        (
            replace(ENDED, exit_code=137),
            2.1,
            TaskEnd(cause="stop-timeout", signal="SIGKILL", grace=2 * SECOND_NS),
        ),
        (replace(ENDED, exit_code=137), 1.9, None),  # killed by hand within its grace period
        (replace(ENDED, exit_code=137, config=replace(CONFIG, stop_signal="9")), 2.1, None),
        (replace(ENDED, exit_code=137, config=replace(CONFIG, stop_grace_ns=0)), 2.1, None),
        (
            SICK,
            None,
            TaskEnd(
                cause="unhealthy",
                health_output="b",
                health_command="test -s /tmp/x",
                health_failures=2,
                health_exit_code=7,
            ),
        ),
        (
            replace(SICK, health=replace(SICK.health, log=(probe(-1, "took too long"),))),
            None,
            TaskEnd(
                cause="unhealthy",
                health_output="took too long",
                health_command="test -s /tmp/x",
                health_failures=2,
            ),
        ),
        # What does not run is called unhealthy, whatever its probes have said.
        (
            replace(SICK, exit_code=1, health=replace(SICK.health, failing_streak=1)),
            None,
            TaskEnd(cause="exit"),
        ),
        (
            replace(ENDED, started_at=ZERO_TIME, error="no"),
            None,
            TaskEnd(cause="start-failed"),
        ),
        (
            replace(ENDED, exit_code=143, interruption=Interruption.MACHINE_RESTARTED),
            None,
            TaskEnd(cause="node-restarted"),
        ),
        (
            replace(ENDED, exit_code=255, interruption=Interruption.MONITOR_LOST),
            None,
            TaskEnd(cause="monitor-lost"),
        ),
    ],
)
def test_each_cause_is_distinguished(
    container: Container, stopping_s: float | None, end: TaskEnd | None
) -> None:
    assert end_of(container, stopping_s) == end


def test_checks_of_a_container_that_is_stopping_already_do_not_count() -> None:
    """They cannot be run any more, which is no cause."""
    broken = tuple(probe(-1, "no such process") for _ in range(3))
    for streak, log in ((4, (probe(7, "a"), probe(7, "b"), *broken[:2])), (9, (probe(7, "b"), *broken))):
        found = end_of(
            replace(SICK, health=Health(status=HealthStatus.UNHEALTHY, failing_streak=streak, log=log)),
            stopping_s=None,
        )
        assert found is not None
        assert (found.health_output, found.health_failures, found.health_exit_code) == ("b", 2, 7)


def test_codes_of_signals_have_their_names() -> None:
    assert [signal_of(code) for code in (0, 1, 128, 137, 255, 300)] == ["", "", "", "SIGKILL", "", ""]


STARTING = replace(
    SICK, state=ContainerState.RUNNING, health=Health(log=(probe(0, "fine"), probe(7, "refused\n")))
)


@pytest.mark.parametrize(
    ("container", "words"),
    [
        (STARTING, 'its health check "test -s /tmp/x" failed: exit 7, output "refused"'),
        (
            replace(STARTING, health=Health(log=(probe(1, ""),))),
            'its health check "test -s /tmp/x" failed: exit 1, no output',
        ),
        (
            replace(STARTING, health=Health(log=(probe(-1, "timed out"),))),
            'its health check "test -s /tmp/x" failed: timed out',
        ),
        (replace(STARTING, health=Health(log=(probe(7, "refused"), probe(0, "")))), ""),
        (
            replace(STARTING, health=SICK.health),
            'unhealthy: its health check "test -s /tmp/x" failed: exit 7, output "b"',
        ),
        (replace(STARTING, health=Health()), ""),
        (replace(STARTING, health=replace(SICK.health, status=HealthStatus.HEALTHY)), ""),
        (ENDED, ""),
    ],
)
def test_a_container_that_is_not_yet_healthy_names_its_last_failed_check(
    container: Container, words: str
) -> None:
    assert failed_check(container) == words
