"""A queue with workers: each job is done once, although workers, Redis and nodes are lost; and a restore."""

from collections.abc import Collection, Iterable

import pytest

from tests.integration.cookbook.lab import Recipe, a_recipe
from tests.support.machines.playground_rig import wait_running, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.needs("debootstrap")]


def put(recipe: Recipe, names: Iterable[str]) -> None:
    """Add jobs, each of them twice, like a client that got no answer."""
    urls = " ".join(f"http://$NODE:8080/jobs/{name}" for name in names for _ in range(2))
    recipe.run(f"curl -sSf --retry 5 --retry-all-errors -X PUT -d text {urls}")


def results(recipe: Recipe) -> list[str]:
    """Return the names of the jobs with a result."""
    lines = recipe.run('curl -sSf --retry 5 --retry-all-errors "http://$NODE:8080/results"').splitlines()
    return sorted(line.split()[0] for line in lines)


def wait_done(recipe: Recipe, names: Collection[str]) -> None:
    wait_until(lambda: len(results(recipe)) >= len(names), f"{len(names)} jobs are done", 90)
    assert results(recipe) == sorted(names), "each job is done once"


def test_every_job_is_done_once() -> None:
    with a_recipe("queue", workers=3) as recipe:
        assert "first" in recipe.next()
        names = ["first", *(f"a{number}" for number in range(60))]
        put(recipe, names[1:])
        recipe.next()  # other workers
        wait_done(recipe, names)
        recipe.next()  # more workers
        assert "0 open" in recipe.next()

        names += [f"b{number}" for number in range(60)]
        put(recipe, names[-60:])
        recipe.kill("queue_worker")
        recipe.kill("queue_redis")
        lost = next(n for n in ("w1", "w2", "w3") if n not in recipe.places("queue_redis"))
        recipe.cluster.skep("kill", lost)
        wait_running(recipe.m1, "queue_worker", 8, 60)
        wait_done(recipe, names)

        wait_running(recipe.m1, "queue_redis", 1)
        recipe.next()  # saved
        put(recipe, ["later"])
        wait_done(recipe, [*names, "later"])
        recipe.next()  # restored
        wait_done(recipe, names)

        (lost,) = recipe.places("queue_redis")
        recipe.cluster.skep("kill", lost)
        wait_until(lambda: lost in recipe.run("skep explain queue_redis"), "it waits for its node")
        recipe.next()
        wait_done(recipe, names)
        recipe.assert_complete()
