"""Record the answers of a real Docker Engine, as root.

``python -m tests.integration.side_by_side.record [GROUP...]``
"""

import sys
import tempfile
from pathlib import Path

from tests.integration.cluster import CLIS
from tests.integration.side_by_side import records
from tests.integration.side_by_side.lines import Place, groups, script
from tests.integration.side_by_side.real_engine import ADDRESS, real_engine


def main(wanted: list[str]) -> None:
    kept = records.load()
    for cli in CLIS:
        of_cli = kept.setdefault(records.version(cli), {})
        for group in wanted:
            with real_engine() as (host, netns), tempfile.TemporaryDirectory() as scratch:
                place = Place(cli, host, ADDRESS, netns, Path(scratch))
                of_cli[group], failures = records.answers(script(group), place)
                assert not failures, failures
                print(f"{cli}: {group}: {len(of_cli[group])} answers", file=sys.stderr)
                records.save(kept)


if __name__ == "__main__":
    main(sys.argv[1:] or groups())
