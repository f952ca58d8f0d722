"""Without a leader dead nodes stay in the tables: each node leaves out those that do not answer its probes."""

import pytest

from tests.integration.test_published_ports import WHOAMI, fetch, in_namespace
from tests.support.machines.playground_rig import IMAGE, TestNode, a_playground, wait_running, wait_until
from tests.support.managers.managers_rig import wait_managers

REQUESTS = 16
LEFT_OUT_WITHIN_S = 60


def answers(node: TestNode) -> set[str]:
    """The tasks that answer a number of consecutive requests to the published port; empty if one fails."""
    space = node.description["netns"]
    try:
        return {in_namespace(space, fetch, "127.0.0.1", 8080).split()[0] for _ in range(REQUESTS)}
    except OSError:
        return set()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_without_a_leader_nodes_that_do_not_answer_leave_the_load_balancing() -> None:
    with a_playground("silent", managers=3, workers=1) as cluster:
        m1, w1 = cluster.node("m1"), cluster.node("w1")
        wait_managers(m1, "m1", "m2", "m3")
        m1.docker("service", "create", "--detach", "--name", "web", "--mode", "global",
                  "--publish", "8080:80", IMAGE, *WHOAMI)  # fmt: skip
        wait_running(m1, "web", 4)
        for node in (m1, w1):
            wait_until(lambda node=node: len(answers(node)) == 4, f"{node.name} balances over all")
        for dead in ("m2", "m3"):
            cluster.skep("kill", dead)
        for node in (m1, w1):
            wait_until(
                lambda node=node: len(answers(node)) == 2,
                f"{node.name} leaves the dead ones out",
                LEFT_OUT_WITHIN_S,
            )
        cluster.skep("start", "m2")
        wait_until(lambda: len(answers(w1)) == 3, "who is back serves again", LEFT_OUT_WITHIN_S)
