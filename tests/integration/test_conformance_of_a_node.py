"""A whole node, from its socket to its etcd, answers the script as the recorded engine did."""

import subprocess
from collections.abc import Iterator, Sequence

import pytest

from tests.conformance import script
from tests.conformance.exchange import Memory, Recorded
from tests.conformance.record import ask
from tests.conformance.script import Step
from tests.conformance.test_replay import DIFFERENCES, OF_LOOPS, recording
from tests.support.machines.daemon_rig import DaemonRig, daemon_rig
from tests.support.machines.directories import a_directory

NODE_DIFFERENCES = {
    "broken JSON before init": "a node that is no manager does not read what is meant for one",
}
"""Differences of a whole node, besides those of a manager."""


@pytest.fixture(scope="module")
def answers() -> Iterator[dict[str, Recorded]]:
    """What a node answers to everything: before it is in a swarm, at the init, and after."""
    with a_directory("skep-") as directory, daemon_rig(directory) as rig:
        rig.start()
        add_address(rig, "10.77.0.1/24")
        yield ask_everything(rig)


def add_address(rig: DaemonRig, address: str) -> None:
    """Give the node the address that the script listens on."""
    assert rig.process is not None
    inside = ("nsenter", "-t", str(rig.process.pid), "-n")
    subprocess.run((*inside, "ip", "address", "add", address, "dev", "lo"), check=True)


def ask_everything(rig: DaemonRig) -> dict[str, Recorded]:
    memory = Memory()
    engine = rig.run / "skep.sock"
    answers = {step.name: ask(engine, step, memory) for step in (*script.BEFORE_INIT, *script.INITS)}
    first = Step(name="init", method="POST", path="/v1.41/swarm/init", body=script.INIT.body, keep="node")
    answers["init"] = ask(engine, first, memory)
    answers |= {step.name: ask(engine, step, memory) for step in script.IN_SWARM}
    return answers


def same(answers: dict[str, Recorded], expected: dict[str, Recorded], steps: Sequence[Step]) -> list[str]:
    """Where status or message differ, apart from the known differences."""
    problems = []
    for step in steps:
        if step.name in DIFFERENCES or step.name in NODE_DIFFERENCES or step.name in OF_LOOPS:
            continue
        mine, theirs = answers[step.name], expected[step.name]
        if (mine.status, mine.message) != (theirs.status, theirs.message):
            problems.append(
                f"{step.name}: {mine.status} {mine.message!r}, not {theirs.status} {theirs.message!r}"
            )
    return problems


def test_a_swarm_call_before_init_is_refused_in_the_engines_words(answers: dict[str, Recorded]) -> None:
    assert same(answers, recording("before_init"), script.BEFORE_INIT) == []


def test_inits_and_joins_that_cannot_work_are_refused_in_the_engines_words(
    answers: dict[str, Recorded],
) -> None:
    assert same(answers, recording("inits"), script.INITS) == []


def test_a_node_that_has_refused_many_inits_takes_a_good_one(answers: dict[str, Recorded]) -> None:
    assert answers["init"].status == 200


def test_a_manager_answers_through_its_front_as_the_engine_does(answers: dict[str, Recorded]) -> None:
    assert same(answers, recording("in_swarm"), script.IN_SWARM) == []
