"""A record of simulated seeds over many runs.  Each line has a range of seeds, the commit, and a digest of its code.

::

    whole 1a2b3c4d/5e6f7a8b 5000000..5000099 failed: 5000057 (48 s)
    whole 9c0d1e2f/5e6f7a8b 5000100..5000199 failed: none (51 s)

Runs of commits with the same digest add up: they differ only in parts that no run uses, or in comments.
Seeds that were simulated again after a bug fix keep both lines, because the record also shows the found faults.
"""

import ast
import hashlib
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

LINE = re.compile(r"([\w-]+) (\S+) (\d+)\.\.(\d+) failed: (none|[\d ]+) \((\d+) s\)")


class Record:
    """The lines of one file about one kind of run."""

    def __init__(self, path: Path, kind: str, code: str) -> None:
        """``kind``: ``whole``, ``store``, ``containers`` or ``what-if``.  ``code``: the digest of ``code_of``."""
        self._path = path
        self._kind = kind
        self._code = code

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
            file.write(
                f"{self._kind} {_commit()}/{self._code} {seeds[0]}..{seeds[-1]} failed: {words} ({took_s:.0f} s)\n"
            )

    def summary(self) -> str:
        """Return a sentence with how many seeds the file has, how many of the present code, and which failed."""
        lived, present = _number(self._ranges()), _number(self._ranges(f"/{self._code}"))
        failed = self.failed()
        words = f"{lived} runs recorded, {present} of the present code, {len(failed)} failed"
        return words + (f": {failed}" if failed else "")

    def _ranges(self, code: str = "") -> list[tuple[int, int, list[int]]]:
        """Return the ranges of this kind with their failed seeds, with ``code`` those whose commit ends with it."""
        if not self._path.exists():
            return []
        found = [match for line in self._path.read_text().splitlines() if (match := LINE.match(line))]
        return [
            (int(match[3]), int(match[4]), [int(seed) for seed in match[5].split() if seed != "none"])
            for match in found
            if match[1] == self._kind and match[2].endswith(code)
        ]


def code_of(modules: Iterable[ModuleType]) -> str:
    """Return a digest of the code of Skep and its simulation in ``modules``, as 8 hexadecimal digits.

    Comments, docstrings and layout do not change a run, so they do not count.
    """
    digest = hashlib.sha256()
    for module in sorted(set(modules), key=lambda one: one.__name__):
        if module.__name__.partition(".")[0] not in {"skep", "sim"} or not module.__file__:
            continue
        tree = _without_texts(ast.parse(Path(module.__file__).read_bytes()))
        digest.update(f"{module.__name__} {ast.dump(tree)}\n".encode())
    return digest.hexdigest()[:8]


def _without_texts(tree: ast.Module) -> ast.Module:
    """Remove statements that are only a text from ``tree``, and return it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [one for one in node.body if not _is_text(one)]
    return tree


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _number(ranges: Iterable[tuple[int, int, list[int]]]) -> int:
    return sum(last - first + 1 for first, last, _ in ranges)


def _commit() -> str:
    """Return the commit of the working tree, with a plus sign if files differ from it."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=8", "--exclude=*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
