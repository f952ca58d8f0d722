"""Record the answers of a real Docker Engine, as root.

``python -m tests.integration.side_by_side.record [--cli PATH]... [GROUP...]``: by these docker commands, otherwise by
those of this machine.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.integration.side_by_side import records
from tests.integration.side_by_side.lines import Place, groups, script
from tests.integration.side_by_side.real_engine import ADDRESS, real_engine
from tests.support.machines.playground_rig import CLIS, docker_version


def main(clis: Sequence[str], wanted: Sequence[str]) -> None:
    kept = records.load()
    for cli in clis:
        of_cli = kept.setdefault(docker_version(cli), {})
        for group in wanted:
            with real_engine() as (host, netns), tempfile.TemporaryDirectory() as scratch:
                place = Place(cli, host, ADDRESS, netns, Path(scratch))
                of_cli[group], failures = records.answers(script(group), place)
                assert not failures, failures
                print(f"{cli}: {group}: {len(of_cli[group])} answers", file=sys.stderr)
                records.save(kept)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cli", action="append")
    parser.add_argument("group", nargs="*")
    given = parser.parse_args()
    main(given.cli or CLIS, given.group or groups())
