"""Ask a node of Skep what a real engine was asked, and show what differs.

``python -m tests.integration.side_by_side.compare [--cli PATH]... [GROUP...]`` (as root) prints the differences of a
new playground, by these docker commands or by those of this machine.
"""

import argparse
import difflib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.integration.side_by_side import records
from tests.integration.side_by_side.lines import Place, by_line, comparable, groups, script
from tests.support.machines.playground_rig import (
    CLIS,
    TestCluster,
    TestNode,
    docker_version,
    remove_services,
    wait_until,
)


def place_of(node: TestNode, cli: str, scratch: Path) -> Place:
    described = node.description
    return Place(cli, node.socket, described["addr"], Path(described["netns"]).name, scratch)


def differences(group: str, place: Place) -> list[str]:
    """One text per line whose answer is not the recorded one.

    Raises: AssertionError: the record is of another script (it has to be made again).
    """
    recorded = records.load()[docker_version(place.cli)][group]
    lines = script(group)
    said = [f"{line.kind} {line.command}" for line in lines if line.is_compared]
    assert said == [record["line"] for record in recorded], f"record {group} again: its script has changed"
    responses, failures = records.answers(lines, place)
    pairs = zip((_again_comparable(record, place) for record in recorded), responses, strict=True)
    return failures + [difference for pair in pairs if (difference := _difference(*pair))]


def _again_comparable(record: records.Record, place: Place) -> records.Record:
    """The record by the present rules, which may know more than those it was made by."""
    texts = {part: comparable(record[part], place) for part in ("stdout", "stderr")}
    if not record["line"].startswith("$ "):
        texts = {part: by_line(text) for part, text in texts.items()}
    return {**record, **texts}


def clear(node: TestNode) -> None:
    """Remove what a script may have left, and be in a swarm."""
    remove_services(node)
    api = node.client().api
    for container in api.containers(all=True):
        if "com.docker.swarm.task.id" not in container["Labels"]:
            api.remove_container(container["Id"], force=True)
    wait_until(lambda: not api.tasks() and not api.containers(all=True), "everything is removed", within_s=60)
    for secret in api.secrets():
        api.remove_secret(secret["ID"])
    for config in api.configs():
        api.remove_config(config["ID"])
    remove_volumes(node)


def remove_volumes(node: TestNode) -> None:
    """Those of earlier tests: some groups count volumes."""
    api = node.client().api
    for volume in api.volumes()["Volumes"] or ():
        api.remove_volume(volume["Name"], force=True)


def _difference(recorded: records.Record, response: records.Record) -> str:
    changes: list[str] = []
    for part in ("exit", "stdout", "stderr"):
        before, after = (f"{each[part]}".splitlines() for each in (recorded, response))
        changes += (f"{part} {change}" for change in _changes(before, after))
    return "\n".join([recorded["line"], *changes, ""]) if changes else ""


def _changes(before: list[str], after: list[str]) -> list[str]:
    diff = difflib.unified_diff(before, after, lineterm="", n=1)
    return [change for change in diff if not change.startswith(("---", "+++", "@@"))]


def main(clis: Sequence[str], wanted: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="skep-beside-", dir="/var/tmp") as directory:
        cluster = TestCluster(Path(directory), f"beside{os.getpid()}")
        cluster.up()
        try:
            for cli in clis:
                for group in wanted:
                    with tempfile.TemporaryDirectory() as scratch:
                        found = differences(group, place_of(cluster.node("m1"), cli, Path(scratch)))
                    print(f"==== {cli} {group}: {len(found)} differences", *found, sep="\n", flush=True)
                    clear(cluster.node("m1"))
        finally:
            cluster.down()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cli", action="append")
    parser.add_argument("group", nargs="*")
    given = parser.parse_args()
    main(given.cli or CLIS, given.group or groups())
