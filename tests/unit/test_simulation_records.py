"""Records of simulated seeds: they add up over runs, and a run continues where the last one ended."""

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sim.record import Record, code_of

ROOT = Path(__file__).parents[2]


def test_ranges_of_one_kind_add_up(tmp_path: Path) -> None:
    record = Record(tmp_path / "kept" / "lives.txt", "whole", "5e6f7a8b")
    assert record.next_seed() == 0
    record.add(range(100, 200), [], 12.3)
    Record(tmp_path / "kept" / "lives.txt", "store", "5e6f7a8b").add(range(900, 910), [901], 1.0)
    record.add(range(200, 250), [207, 249], 8.0)
    assert record.next_seed() == 250
    record.add(range(250, 260), [], 1.0)
    file = tmp_path / "kept" / "lives.txt"
    file.write_text(re.sub(r"/\w+ 250", "/otherone 250", file.read_text()))
    words = "160 runs recorded, 150 of the present code, 2 failed: [207, 249]"
    assert record.summary() == words
    first = (tmp_path / "kept" / "lives.txt").read_text().splitlines()[0]
    assert first.startswith("whole ")
    assert first.endswith(" 100..199 failed: none (12 s)")


def test_a_recorded_run_continues_after_its_last_seed(tmp_path: Path) -> None:
    file = tmp_path / "lives.txt"
    Record(file, "store", "5e6f7a8b").add(range(3), [], 1.0)
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
    assert done.stdout == "4 runs recorded, 1 of the present code, 0 failed\n"
    assert " 3..3 failed: none " in file.read_text().splitlines()[1]


CODE = """def limit():
    return 2
"""


@pytest.mark.parametrize(
    ("changed", "is_same"),
    [
        (CODE, True),
        ('"""The limit."""\n\n\ndef limit():\n    """Return it."""\n    return 2  # as in Docker\n', True),
        (CODE.replace("2", "3"), False),
        (CODE + "limit = limit()\n", False),
    ],
)
def test_the_digest_is_that_of_what_is_simulated(tmp_path: Path, changed: str, is_same: bool) -> None:
    assert (code_of([_module(tmp_path, changed)]) == code_of([_module(tmp_path, CODE)])) is is_same


def test_the_digest_is_that_of_skep_and_its_simulation(tmp_path: Path) -> None:
    module, other = _module(tmp_path, CODE), ModuleType("typing")
    other.__file__ = __file__
    assert code_of([other, module]) == code_of([module]) != code_of([])
    module.__name__ = "skep.other"
    assert code_of([module]) != code_of([_module(tmp_path, CODE)])


def _module(folder: Path, code: str) -> ModuleType:
    module = ModuleType("skep.limits")
    module.__file__ = str(folder / "limits.py")
    Path(module.__file__).write_text(code)
    return module
