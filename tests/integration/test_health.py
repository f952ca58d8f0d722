"""Health checks through docker: what a service says, ``docker ps`` shows, and what happens to who is unhealthy."""

import subprocess

import pytest

from tests.support.machines.playground_rig import IMAGE, SKEP, TestNode, containers, wait_running, wait_until

pytestmark = pytest.mark.timeout(120)

QUICK = (
    "--health-interval",
    "200ms",
    "--health-retries",
    "2",
    "--restart-delay",
    "0s",
    "--stop-grace-period",
    "1s",
)


def test_a_service_converges_when_its_probes_succeed_and_an_unhealthy_task_is_replaced(m1: TestNode) -> None:
    probe = ("--health-cmd", "test ! -e /tmp/broken")
    m1.docker("service", "create", "--name", "web", *probe, *QUICK, IMAGE, "sleep", "600")
    (first,) = wait_running(m1, "web", 1)
    assert "(healthy)" in m1.docker("ps", "--filter", "health=healthy").stdout
    (container,) = containers(m1, "web")
    health = m1.client().api.inspect_container(container["Id"])["State"]["Health"]
    assert (health["Status"], health["FailingStreak"]) == ("healthy", 0)

    m1.docker("exec", container["Id"], "touch", "/tmp/broken")

    def is_replaced() -> bool:
        return [one["Id"] for one in containers(m1, "web")] not in ([], [container["Id"]])

    wait_until(is_replaced, "the unhealthy task is replaced", 30)
    wait_running(m1, "web", 1)
    failed = m1.client().api.inspect_task(first["ID"])["Status"]
    assert failed["State"] == "failed"
    assert failed["Err"].endswith(": dockerexec: unhealthy container")


def test_a_task_whose_probe_never_succeeds_never_runs_and_says_why(m1: TestNode) -> None:
    probe = ("--health-cmd", "false", "--restart-max-attempts", "1", "--detach")
    m1.docker("service", "create", "--name", "web", *probe, *QUICK, IMAGE, "sleep", "600")

    def reasons() -> str:
        return m1.docker("service", "ps", "--no-trunc", "--format", "{{.Error}}", "web").stdout

    wait_until(lambda: "dockerexec: unhealthy container" in reasons(), "the reason is shown", 30)
    words = m1.docker(
        "events", "--since", "1m", "--until", "0s", "--filter", "event=health_status", check=False
    )
    assert "health_status: unhealthy" in words.stdout


def test_a_task_that_becomes_unhealthy_gets_no_connections_while_it_stops(m1: TestNode) -> None:
    """As in Docker, whose nodes take it out of the load balancing before they stop it."""
    stays = "trap '' TERM; while :; do sleep 1; done"
    m1.docker("network", "create", "--driver", "overlay", "meeting")
    m1.docker(
        *("service", "create", "--name", "web", "--replicas", "2", "--network", "meeting"),
        *("--health-cmd", "test ! -e /tmp/broken", *QUICK, "--stop-grace-period", "60s"),
        *(IMAGE, "sh", "-c", stays),
    )
    wait_running(m1, "web", 2)
    sick, well = (one["Id"] for one in containers(m1, "web"))

    def addresses() -> int:
        found = m1.docker("exec", well, "nslookup", "-type=a", "tasks.web", check=False).stdout
        return found.partition("Name:")[2].count("Address")

    wait_until(lambda: addresses() == 2, "both tasks serve")
    m1.docker("exec", sick, "touch", "/tmp/broken")
    wait_until(lambda: addresses() == 1, "the other task serves alone")
    assert m1.docker("inspect", "--format", "{{.State.Status}}", sick).stdout == "running\n"
    command = [SKEP, "--host", m1.socket, "explain", "web"]
    explained = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert 'unhealthy: its health check "test ! -e /tmp/broken" failed 2 times in a row' in explained
    assert "stops it" in explained
    m1.docker("kill", sick)
    m1.docker("service", "rm", "web")
