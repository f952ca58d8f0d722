"""Prometheus in the cluster that it watches: its alerts reach a receiver when they fire and when they are resolved."""

import json
import re
from pathlib import Path

import pytest

from tests.integration.cookbook.lab import Recipe, a_recipe
from tests.support.machines.playground_rig import wait_running, wait_until
from tests.support.machines.webhook_receiver import a_receiver

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.needs("debootstrap")]


def shorten(recipe: Recipe) -> None:
    """Make the times short, because a test cannot wait minutes for an alert."""
    rules, stack = (recipe.directory / name for name in ("skep-alerts.yml", "compose.yaml"))
    rules.write_text(re.sub(r"^ +for: .*\n", "", rules.read_text(), flags=re.MULTILINE))
    stack.write_text(re.sub(r"(15s|1m)(?=[,}])", "1s", stack.read_text()))


def received(path: Path) -> set[tuple[str, str]]:
    """Return the name and status of every alert in the messages."""
    messages = [json.loads(line) for line in path.read_text().splitlines() if line]
    alerts = [alert for message in messages for alert in message["alerts"]]
    return {(alert["labels"]["alertname"], alert["status"]) for alert in alerts}


def test_alerts_fire_and_are_resolved(tmp_path: Path) -> None:
    with a_recipe("alerts", configuration='metrics-addr = ":9323"\n') as recipe:
        messages = tmp_path / "messages"
        address = recipe.m1.description["addr"]
        (recipe.directory / ".env").write_text(f"MANAGER={address}\nRECEIVER=http://{address}:8080/\n")
        shorten(recipe)
        with a_receiver(recipe.m1, messages):
            recipe.next()
            health = recipe.blocks[1]
            wait_until(lambda: recipe.run(health).count('job="skep"') == 3, "Prometheus reads every node", 60)
            up = [line for line in recipe.next().splitlines() if line.startswith("up{")]
            assert len(up) == 5
            assert all("=> 1 @" in line for line in up), up
            recipe.next()  # a service that no node can run
            fires = ("SkepServiceDegraded", "firing")
            wait_until(lambda: fires in received(messages), "the alert is received", 60)
            assert "SkepServiceDegraded" in recipe.next()
            recipe.next()  # it is removed
            over = ("SkepServiceDegraded", "resolved")
            wait_until(lambda: over in received(messages), "its end is received", 60)
            recipe.assert_complete()

            (lost,) = recipe.places("alerts_prometheus")
            recipe.cluster.skep("kill", lost)
            wait_until(lambda: set(recipe.places("alerts_prometheus")) - {lost}, "it runs elsewhere", 60)
            fires = ("SkepNodeDown", "firing")
            wait_until(lambda: fires in received(messages), "the loss is received", 60)
            recipe.cluster.skep("start", lost)
            over = ("SkepNodeDown", "resolved")
            wait_until(lambda: over in received(messages), "its return is received", 60)
            wait_running(recipe.m1, "alerts_prometheus", 1)
