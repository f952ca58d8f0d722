"""A CI service: jobs in containers of their own, of which none is lost with a runner or a node."""

import pytest

from tests.integration.cookbook.lab import Recipe, a_recipe
from tests.support.machines.playground_rig import TestNode, wait_running, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500), pytest.mark.needs("debootstrap")]


def builds(recipe: Recipe) -> list[tuple[str, str, str]]:
    """Return result, runner and command of every build."""
    lines = recipe.run("skep exec ci_master results").splitlines()
    found = [line.split(maxsplit=3) for line in lines]
    return [(words[1], words[2], words[3] if len(words) > 3 else "") for words in found]


def of(recipe: Recipe, command: str) -> list[str]:
    """Return the results of a job's builds."""
    return [result for result, _, own in builds(recipe) if own == command]


def submit(recipe: Recipe, command: str) -> None:
    recipe.run(f"skep exec ci_master submit busybox:1 '{command}'")


def leftovers(node: TestNode) -> str:
    return node.docker("ps", "--all", "--quiet", "--filter", "label=ci.runner").stdout


def test_every_job_runs_in_its_container_and_none_is_lost_with_a_node() -> None:
    with a_recipe("ci", workers=3) as recipe:
        recipe.next()  # deployed
        shown = recipe.next()
        assert "success runner-" in shown
        assert "\nhello from " in shown
        submit(recipe, "echo said; exit 3")
        wait_until(lambda: of(recipe, "echo said; exit 3") == ["failure"], "a job fails", 60)
        recipe.next()  # more runners
        wait_running(recipe.m1, "ci_runner", 4, 60)

        master = recipe.places("ci_master")[0]
        jobs = [f"sleep 20; echo {number}" for number in range(4)]
        for command in jobs:
            submit(recipe, command)
        wait_until(lambda: sum(row[0] == "running" for row in builds(recipe)) == 4, "four jobs run", 60)
        busy = {row[1] for row in builds(recipe) if row[0] == "running"}
        slots = {f"runner-{slot}": place for slot, place in enumerate(recipe.places("ci_runner"), 1)}
        lost = next((slots[name] for name in sorted(busy) if slots[name] != master), "")
        assert lost, f"{busy} on {slots}, with the master on {master}"
        recipe.cluster.skep("kill", lost)
        wait_until(
            lambda: all(of(recipe, command)[-1:] == ["success"] for command in jobs), "all jobs end", 150
        )
        assert any(row[0] == "retry" for row in builds(recipe)), "jobs of the lost runner ran again"

        assert "success" in recipe.next()  # healthy
        recipe.next()  # updated
        submit(recipe, "echo after")
        wait_until(lambda: of(recipe, "echo after")[-1:] == ["success"], "a job after the update", 90)
        nodes = [node for node in recipe.cluster.nodes() if node.name not in ("m1", lost)]
        wait_until(lambda: not "".join(map(leftovers, nodes)), "no container of a job is left", 30)

        (master,) = recipe.places("ci_master")
        recipe.cluster.skep("kill", master)
        wait_until(lambda: master in recipe.run("skep explain ci_master"), "it waits for its node")
        recipe.next()
        submit(recipe, "echo new")
        wait_until(lambda: of(recipe, "echo new") == ["success"], "a job with a new list", 90)
        recipe.assert_complete()
