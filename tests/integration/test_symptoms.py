"""Ten symptoms on a real cluster: what its user reads leads to an answer, by the search of the documents' site.

The words that someone would type are taken from what the cluster prints.  Then the entry on the page of symptoms has
these words, as the site's search index knows it.
"""

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from html import unescape

import pytest

from tests.support.harness.documents import build_site
from tests.support.machines.playground_rig import (
    IMAGE,
    SKEP,
    TestCluster,
    TestNode,
    a_playground,
    create,
    wait_running,
    wait_until,
)
from tests.support.managers.managers_rig import wait_managers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def sections(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The text of each section of the built site, by its address."""
    directory = tmp_path_factory.mktemp("site")
    build_site(directory, within_s=200)
    index = json.loads((directory / "search/search_index.json").read_text())
    return {
        one["location"]: unescape(re.sub(r"<[^>]+>", "", f"{one['title']} {one['text']}"))
        for one in index["docs"]
    }


@pytest.fixture(scope="module")
def cluster() -> Iterator[TestCluster]:
    with a_playground("symptoms", managers=2, workers=1) as cluster:
        wait_managers(cluster.node("m1"), "m1", "m2")
        yield cluster


def explained(node: TestNode, name: str) -> str:
    command = [SKEP, "--host", node.socket, "explain", name]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout


def explains(cluster: TestCluster, name: str, words: str) -> str:
    """What ``skep explain`` says of a service, once it has the words."""
    m1 = cluster.node("m1")
    return wait_until(lambda: said if words in (said := explained(m1, name)) else "", f"{name}: {words}", 90)


def lists(cluster: TestCluster, name: str, words: str) -> str:
    """What ``docker service ps`` says of it."""
    m1 = cluster.node("m1")

    def listed() -> str:
        said = m1.docker("service", "ps", "--no-trunc", name).stdout
        return said if words in said else ""

    return wait_until(listed, f"{name}: {words}", 90)


def refused(node: TestNode, *words: str) -> str:
    done = node.docker(*words, check=False)
    assert done.returncode != 0
    return done.stderr


def too_large(cluster: TestCluster, words: str) -> str:
    create(cluster.node("m1"), "large", 1, "--reserve-memory", "900g")
    return explains(cluster, "large", words)


def nowhere(cluster: TestCluster, words: str) -> str:
    create(cluster.node("m1"), "nowhere", 1, "--constraint", "node.labels.zone == north")
    return lists(cluster, "nowhere", words)


def port_is_taken(cluster: TestCluster, words: str) -> str:
    port = "--publish=mode=host,target=80,published=18099"
    m1 = cluster.node("m1")
    everywhere = ("--detach", "--name", "first", "--mode", "global", port)
    m1.docker("service", "create", *everywhere, IMAGE, "sleep", "600")
    wait_running(m1, "first", 3)
    create(m1, "second", 1, port)
    return lists(cluster, "second", words)


def image_is_missing(cluster: TestCluster, words: str) -> str:
    cluster.node("m1").docker("service", "create", "--detach", "--name", "imageless", "nowhere/nothing:1")
    return lists(cluster, "imageless", words)


def command_is_missing(cluster: TestCluster, words: str) -> str:
    create(cluster.node("m1"), "commandless", 1, command=("sh", "-c", "exit 127"))
    return explains(cluster, "commandless", words)


def is_unhealthy(cluster: TestCluster, words: str) -> str:
    check = ("--health-cmd", "false", "--health-interval", "500ms", "--health-retries", "2")
    create(cluster.node("m1"), "sick", 1, *check)
    return explains(cluster, "sick", words)


def update_is_paused(cluster: TestCluster, words: str) -> str:
    m1 = cluster.node("m1")
    create(m1, "paused", 1)
    wait_running(m1, "paused", 1)
    m1.docker("service", "update", "--detach", "--update-monitor", "5s", "--args", "sh -c 'exit 3'", "paused")

    def status() -> dict[str, str]:
        found: dict[str, str] = m1.client().services.get("paused").attrs.get("UpdateStatus") or {}
        return found

    wait_until(lambda: status().get("State") == "paused", "the update is paused", 90)
    return status()["Message"]


def secret_is_in_use(cluster: TestCluster, words: str) -> str:
    m1 = cluster.node("m1")
    m1.docker("secret", "create", "kept", "-", stdin="x")
    create(m1, "user", 1, "--secret", "kept")
    return refused(m1, "secret", "rm", "kept")


def a_worker_is_asked(cluster: TestCluster, words: str) -> str:
    return refused(cluster.node("w1"), "service", "ls")


def joins_again(cluster: TestCluster, words: str) -> str:
    m1 = cluster.node("m1")
    token = m1.docker("swarm", "join-token", "-q", "worker").stdout.strip()
    return refused(cluster.node("w1"), "swarm", "join", "--token", token, f"{m1.description['addr']}:2377")


def joins_with_an_old_token(cluster: TestCluster, words: str) -> str:
    w1, m1 = cluster.node("w1"), cluster.node("m1")
    token = m1.docker("swarm", "join-token", "-q", "worker").stdout.strip()
    m1.docker("swarm", "join-token", "--rotate", "worker")
    w1.docker("swarm", "leave", "--force")
    return refused(w1, "swarm", "join", "--token", token, f"{m1.description['addr']}:2377")


def quorum_is_lost(cluster: TestCluster, words: str) -> str:
    cluster.skep("kill", "m2")
    m1 = cluster.node("m1")
    wait_until(lambda: "leader" in m1.docker("node", "ls", check=False).stderr, "there is no leader", 60)
    return refused(m1, "node", "ls")


SYMPTOMS: list[tuple[Callable[[TestCluster, str], str], str, str]] = [
    (too_large, "the largest node", "a-task-stays-pending"),
    (nowhere, "scheduling constraints not satisfied", "a-task-stays-pending"),
    (port_is_taken, "host-mode port already in use", "a-task-stays-pending"),
    (image_is_missing, "No such image", "an-image-is-not-found"),
    (command_is_missing, "exit 127", "a-service-restarts-again-and-again"),
    (is_unhealthy, "unhealthy", "a-service-restarts-again-and-again"),
    (update_is_paused, "update paused", "an-update-does-not-finish"),
    (secret_is_in_use, "is in use by the following service", "a-secret-or-config-cannot-be-removed"),
    (a_worker_is_asked, "This node is not a swarm manager", "this-node-is-not-a-swarm-manager"),
    (joins_again, "This node is already part of a swarm", "a-node-cannot-join"),
    (joins_with_an_old_token, "A valid join token is necessary", "a-node-cannot-join"),
    (quorum_is_lost, "The swarm does not have a leader", "the-swarm-does-not-have-a-leader"),
]
"""What happens, the words that its user reads and looks for, and the entry that answers.  The last break it."""


@pytest.mark.parametrize(
    ("happens", "words", "entry"), SYMPTOMS, ids=lambda one: getattr(one, "__name__", "")
)
def test_the_words_of_a_symptom_lead_to_its_answer(
    cluster: TestCluster,
    sections: dict[str, str],
    happens: Callable[[TestCluster, str], str],
    words: str,
    entry: str,
) -> None:
    seen = happens(cluster, words)
    assert words in seen
    found = [address for address, text in sections.items() if words.lower() in text.lower()]
    assert f"guide/troubleshooting.html#{entry}" in found
