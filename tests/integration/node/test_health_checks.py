"""Probes in real containers: what a task waits for, and what ends it."""

import asyncio

import pytest

from skep.agent.executor.oci import OciExecutor
from skep.engine.api.responses.container_responses import status
from skep.engine.containers.container import Container, HealthStatus, Probe
from skep.engine.containers.limited_execs import OUTPUT_BYTES_MAX
from skep.errors import SkepError
from skep.model.container import HealthConfig
from skep.model.values.times import SECOND_NS
from tests.integration.node.conftest import Runner, eventually
from tests.integration.node.test_oci_tasks import a_task
from tests.support.engine.runc_lab import Lab

TENTH_NS = SECOND_NS // 10


def a_check(line: str, **fields: int) -> HealthConfig:
    return HealthConfig(test=("CMD-SHELL", line), interval=TENTH_NS, **{"retries": 2, **fields})


async def test_a_task_runs_only_when_its_probe_has_succeeded(executor: OciExecutor) -> None:
    task = a_task(
        "sh", "-c", "sleep 0.5; touch /tmp/up; sleep 100", healthcheck=a_check("ls /tmp/up", retries=50)
    )
    controller = executor.controller(task)
    await controller.prepare()
    with executor.engine.events.subscribed() as events:
        async with asyncio.TaskGroup() as group:
            starting = group.create_task(controller.start())
            async for event in events:
                if event.action == "start":
                    container = executor.engine.get(event.container_id)
                    assert status(container, 0).endswith("(health: starting)")
                if event.action.startswith("health_status"):
                    break
            await starting
    assert event.action == "health_status: healthy"
    container = executor.engine.get(task.name)
    assert container.health is not None
    assert container.health.log[-1].output == "/tmp/up\n"
    assert container.health.log[0].exit_code == 1
    await controller.remove()


async def test_of_a_probe_that_prints_10_mb_the_beginning_is_kept(run: Runner) -> None:
    check = a_check("yes | head -c 10000000", retries=50, timeout=100 * TENTH_NS)
    container = await run.start("sleep", "100", healthcheck=check)
    await eventually(lambda: log_of(run, container), "a probe has ended", within_s=20)
    probe = log_of(run, container)[0]
    assert (probe.exit_code, probe.output) == (0, "y\n" * (OUTPUT_BYTES_MAX // 2) + "...")


def log_of(run: Runner, container: Container) -> tuple[Probe, ...]:
    health = run.engine.get(container.id).health
    return health.log if health is not None else ()


async def test_a_task_that_never_becomes_healthy_fails_in_dockers_words(executor: OciExecutor) -> None:
    controller = executor.controller(a_task("sleep", "100", init=True, healthcheck=a_check("exit 3")))
    await controller.prepare()
    with pytest.raises(SkepError, match=r"^dockerexec: unhealthy container$"):
        await controller.start()
    observed = controller.observed()
    assert observed is not None
    assert observed.container.exit_code == 143
    await controller.remove()


async def test_a_task_that_becomes_unhealthy_is_stopped(executor: OciExecutor) -> None:
    task = a_task("sleep", "100", init=True, healthcheck=a_check("! ls /tmp/broken"))
    controller = executor.controller(task)
    await controller.prepare()
    await controller.start()
    container = executor.engine.get(task.name)
    (executor.engine.bundles.rootfs(container.id) / "tmp/broken").touch()
    ended = await controller.wait()
    assert (
        ended.message
        == "task: non-zero exit (143): dockerexec: unhealthy container: last health check: /tmp/broken"
    )
    await controller.remove()


async def test_a_probe_that_hangs_is_killed_and_counts_as_failed(executor: OciExecutor) -> None:
    check = a_check("echo begun; exec sleep 100", timeout=20 * TENTH_NS, retries=1)
    task = a_task("sleep", "100", init=True, healthcheck=check)
    controller = executor.controller(task)
    await controller.prepare()
    with pytest.raises(SkepError, match="unhealthy"):
        await controller.start()
    container = executor.engine.get(task.name)
    assert container.health is not None
    (probe,) = container.health.log
    assert (probe.exit_code, probe.output) == (-1, "Health check exceeded timeout (2s): begun\n")
    assert executor.engine.execs.of(container.id) == ()
    await controller.remove()


async def test_a_container_is_probed_on_by_the_next_node_process(lab: Lab) -> None:
    task = a_task("sleep", "100", healthcheck=a_check("! ls /tmp/broken"), init=True)
    first = lab.executor()
    async with first.running():
        await first.controller(task).prepare()
        await first.controller(task).start()
    second = lab.executor()
    async with second.running():
        controller = second.controller(task)
        container = second.engine.get(task.name)
        assert container.health is not None
        assert container.health.status is HealthStatus.HEALTHY
        (second.engine.bundles.rootfs(container.id) / "tmp/broken").touch()
        assert "unhealthy" in (await controller.wait()).message
        await controller.remove()
