"""A web application with PostgreSQL: its rows survive updates, a restart, a restore, and the loss of nodes."""

from collections import Counter
from pathlib import Path

import pytest

from tests.integration.cookbook.lab import Recipe, a_recipe
from tests.integration.networks.lab import asking, outside
from tests.support.machines.playground_rig import wait_running, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.needs("debootstrap", "openssl")]

BACKUPS = {"BACKUPS": "w1"}


def writers(recipe: Recipe) -> tuple[Path, list[str]]:
    """Return clients that add notes, one with a connection per request and one that keeps its connection."""
    url = f"http://{recipe.m1.description['addr']}:8080/"
    return outside(recipe.cluster), ["strict_client.py", "--method", "POST", "--pause", "0.05", url]


def notes(recipe: Recipe) -> Counter[str]:
    return Counter(recipe.run('curl -sSf "http://$NODE:8080/"').splitlines())


def add(recipe: Recipe, text: str) -> None:
    recipe.run(f'curl -sSf -d text={text} "http://$NODE:8080/"')


def test_updates_backups_and_a_lost_node() -> None:
    with a_recipe("postgres", workers=3) as recipe:
        assert recipe.next(**BACKUPS).endswith("added 1\nfirst\n")
        assert notes(recipe) == {"first": 1}
        with asking(writers(recipe)) as seen:
            recipe.next()  # another application
        assert seen.failed == []
        assert set(seen.answered) == {"added", "noted"}
        with asking(writers(recipe)) as further:
            recipe.next()  # another task of the database
        assert further.failed == []
        written = Counter({"first": 1, "empty": seen.count + further.count})
        assert notes(recipe) == written, "each answered request is one row, and there is no other"

        assert ".dump" in recipe.next()  # a backup in the cluster
        recipe.next()  # and one outside
        add(recipe, "later")
        assert "restored /backups/" in recipe.next()
        assert notes(recipe) == written
        add(recipe, "later")
        recipe.next()  # the one outside
        assert notes(recipe) == written
        assert "notes_db: 1 of 1 tasks run: healthy" in recipe.next()

        (lost,) = recipe.places("notes_db")
        assert lost != "w1"
        recipe.cluster.skep("kill", lost)
        wait_until(lambda: lost in recipe.run("skep explain notes_db"), "the database waits for its node")
        recipe.next()
        recipe.next()  # give up, and restore
        assert recipe.places("notes_db")[0] not in (lost, "w1")
        wait_running(recipe.m1, "notes_web", 2)
        assert notes(recipe) == written


def test_the_database_moves_with_shared_storage() -> None:
    """A directory of this machine, which all nodes see, takes the place of the NFS server's."""
    with a_recipe("postgres", workers=2) as recipe:
        shared = recipe.directory / "shared"
        shared.mkdir()
        settings = f"SHARED_TYPE=none\nSHARED_OPTIONS=bind\nSHARED_DEVICE={shared}\n"
        (recipe.directory / ".env").write_text(settings)
        recipe.run("openssl rand -hex 24 >password.txt")
        recipe.run(recipe.blocks[-1])
        add(recipe, "first")
        (lost,) = recipe.places("notes_db")
        recipe.cluster.skep("kill", lost)
        wait_until(lambda: set(recipe.places("notes_db")) - {lost}, "the database has moved", 120)
        add(recipe, "second")
        assert notes(recipe) == {"first": 1, "second": 1}
