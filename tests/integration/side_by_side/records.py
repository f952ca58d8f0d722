"""The recorded answers of a real engine: ``recorded.json``, by version of the docker command and by group."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.integration.side_by_side.lines import UNTIL_S, Line, Place, run

RECORDED = Path(__file__).with_name("recorded.json")

Record = dict[str, Any]
Records = dict[str, dict[str, list[Record]]]


def load() -> Records:
    records: Records = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    return records


def save(records: Records) -> None:
    RECORDED.write_text(json.dumps(records, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def answers(lines: list[Line], place: Place) -> tuple[list[Record], list[str]]:
    """Run all lines.  Gives the answers of those that are compared, and which conditions did not come true."""
    records, failures = [], []
    for line in lines:
        response = run(line, place)
        if line.is_compared:
            records.append({"line": f"{line.kind} {line.command}", **asdict(response)})
        elif line.kind == "until" and response.exit:
            failures.append(f"not within {UNTIL_S:.0f} s: {line.command}\n")
    return records, failures
