"""Records of simulated seeds: they add up over runs, and a run continues where the last one ended."""

import subprocess
import sys
from pathlib import Path

from sim.record import Record

ROOT = Path(__file__).parents[2]


def test_ranges_of_one_kind_add_up(tmp_path: Path) -> None:
    record = Record(tmp_path / "kept" / "lives.txt", "whole")
    assert record.next_seed() == 0
    record.add(range(100, 200), [], 12.3)
    Record(tmp_path / "kept" / "lives.txt", "store").add(range(900, 910), [901], 1.0)
    record.add(range(200, 250), [207, 249], 8.0)
    assert record.next_seed() == 250
    assert record.summary() == "150 runs recorded, 2 failed: [207, 249]"
    first = (tmp_path / "kept" / "lives.txt").read_text().splitlines()[0]
    assert first.startswith("whole ")
    assert first.endswith(" 100..199 failed: none (12 s)")


def test_a_recorded_run_continues_after_its_last_seed(tmp_path: Path) -> None:
    file = tmp_path / "lives.txt"
    Record(file, "store").add(range(3), [], 1.0)
    command = [
        sys.executable,
        "-m",
        "sim",
        "--store",
        "--seeds",
        "4",
        "--processes",
        "1",
        "--record",
        str(file),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "4 runs recorded, 0 failed\n"
    assert " 3..3 failed: none " in file.read_text().splitlines()[1]
