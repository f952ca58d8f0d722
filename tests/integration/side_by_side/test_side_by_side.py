"""The docker command shows of Skep what it showed of a real engine: exit code, stdout and stderr of every line.

What is known to differ is marked so in the scripts, with its reason in docs/conformance.md.
"""

from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from tests.integration.side_by_side import records
from tests.integration.side_by_side.compare import clear, differences, place_of, remove_volumes
from tests.integration.side_by_side.lines import groups, script
from tests.support.machines.playground_rig import CLIS, TestCluster, TestNode, docker_version

RECORDED = records.load()
KNOWN_CLIS = [cli for cli in CLIS if docker_version(cli) in RECORDED]
SLOW = (
    *("build_files", "builds", "containers", "portainer", "service_create", "services", "stacks"),
    "traefik_and_visualizer",
)
"""Groups that take more than a few seconds."""


def _recorded(wanted: list[str]) -> list[ParameterSet]:
    """Each group with each docker command it was recorded by, the newest first; older ones only in long runs."""
    return [
        pytest.param(group, cli, marks=[pytest.mark.slow] if number else [])
        for group in wanted
        for number, cli in enumerate(KNOWN_CLIS[::-1])
        if group in RECORDED[docker_version(cli)]
    ]


pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize(
    ("group", "cli"), _recorded([group for group in groups() if group != "swarm" and group not in SLOW])
)
def test_a_group_of_commands_is_answered_as_by_a_real_engine(
    m1: TestNode, tmp_path: Path, group: str, cli: str
) -> None:
    _compare(m1, tmp_path, group, cli)


@pytest.mark.slow
@pytest.mark.parametrize(("group", "cli"), _recorded(list(SLOW)))
def test_a_long_group_of_commands_is_answered_as_by_a_real_engine(
    m1: TestNode, tmp_path: Path, group: str, cli: str
) -> None:
    _compare(m1, tmp_path, group, cli)


@pytest.mark.slow
@pytest.mark.parametrize("cli", KNOWN_CLIS)
def test_a_swarm_is_made_changed_and_left_as_with_a_real_engine(
    own_cluster: TestCluster, tmp_path: Path, cli: str
) -> None:
    _compare(own_cluster.node("m1"), tmp_path, "swarm", cli)


def _compare(node: TestNode, scratch: Path, group: str, cli: str) -> None:
    remove_volumes(node)
    found = differences(group, place_of(node, cli, scratch))
    clear(node)
    assert not found, "\n".join(["- the engine, + Skep", *found])


def test_at_least_one_docker_command_of_this_machine_was_recorded() -> None:
    assert KNOWN_CLIS, f"none of {CLIS}: python -m tests.integration.side_by_side.record"


@pytest.mark.parametrize("group", groups())
def test_the_records_are_of_the_present_scripts(group: str) -> None:
    compared = [f"{line.kind} {line.command}" for line in script(group) if line.is_compared]
    of_group = [of_cli[group] for of_cli in RECORDED.values() if group in of_cli]
    assert of_group, f"record {group}"
    for records_of_cli in of_group:
        assert [record["line"] for record in records_of_cli] == compared, f"record {group} again"


def test_the_documents_say_how_many_lines_are_compared() -> None:
    """In whole hundreds, so that few new lines change a page."""
    count = sum(line.is_compared for group in groups() for line in script(group))
    said = f"over {count // 100 * 100:,} command lines"
    docs = Path(__file__).parents[3] / "docs"
    for page in ("conformance.md", "reference/compatibility.md"):
        assert said in (docs / page).read_text(), f"{page}: {said}"


def test_every_line_that_may_differ_has_its_reason_in_the_documents() -> None:
    conformance = (Path(__file__).parents[3] / "docs" / "conformance.md").read_text()
    lines = [line.command for group in groups() for line in script(group) if line.kind == "differs"]
    assert [line for line in lines if line not in conformance] == []
