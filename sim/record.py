"""A record of simulated seeds over many runs.  Each line has a range of seeds and the simulated commit.

::

    whole 1a2b3c4d 5000000..5000099 failed: 5000057 (48 s)
    whole 1a2b3c4d 5000100..5000199 failed: none (51 s)

Seeds that were simulated again after a bug fix keep both lines, because the record also shows the found faults.
"""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

LINE = re.compile(r"([\w-]+) (\S+) (\d+)\.\.(\d+) failed: (none|[\d ]+) \((\d+) s\)")


class Record:
    """The lines of one file about one kind of run."""

    def __init__(self, path: Path, kind: str) -> None:
        """``kind``: ``whole``, ``store``, ``containers`` or ``what-if``."""
        self._path = path
        self._kind = kind

    def next_seed(self) -> int:
        """Return the seed after the last one in the file, or 0 if there is none."""
        return max((last + 1 for _, last, _ in self._ranges()), default=0)

    def failed(self) -> list[int]:
        """Return the seeds that failed."""
        return [seed for _, _, failed in self._ranges() for seed in failed]

    def add(self, seeds: Sequence[int], failed: Sequence[int], took_s: float) -> None:
        """Append the result of consecutive ``seeds``."""
        words = " ".join(map(str, failed)) or "none"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(f"{self._kind} {_commit()} {seeds[0]}..{seeds[-1]} failed: {words} ({took_s:.0f} s)\n")

    def summary(self) -> str:
        """Return a sentence with the number of seeds in the file, and the failed ones."""
        lived = sum(last - first + 1 for first, last, _ in self._ranges())
        failed = self.failed()
        return f"{lived} runs recorded, {len(failed)} failed" + (f": {failed}" if failed else "")

    def _ranges(self) -> list[tuple[int, int, list[int]]]:
        if not self._path.exists():
            return []
        found = [match for line in self._path.read_text().splitlines() if (match := LINE.match(line))]
        return [
            (int(match[3]), int(match[4]), [int(seed) for seed in match[5].split() if seed != "none"])
            for match in found
            if match[1] == self._kind
        ]


def _commit() -> str:
    """Return the commit of the working tree, with a plus sign if files differ from it."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=8", "--exclude=*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
