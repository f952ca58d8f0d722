"""The order in which the workers of pytest-xdist take the files of a whole run.

Real processes leave the processors idle while they wait for each other, so their files are spread among
computing files.  They end before the others, so that no worker starts a long test when the others have nothing left.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import pytest

from tests.support.harness.second_attempts import REAL

_S = {
    "tests/browser/": 2.0,
    "tests/component/": 0.2,
    "tests/contract/": 0.2,
    "tests/integration/": 1.7,
    "tests/sim/": 0.7,
}
"""Seconds that a test of a folder takes on average, on two processors that run three workers."""
_OTHERS_S = 0.03
_SHARE_OF_COMPUTING = 0.9
"""Part of the computing tests that has run when the last file of real processes starts."""


def spread(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Return the tests file by file, with real processes among computing tests."""
    files: dict[str, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(file_of(item), []).append(item)
    return [item for file in order(Counter(map(file_of, items))) for item in files[file]]


def order(tests: Counter[str]) -> Iterator[str]:
    """Yield the files, each kind from the largest to the smallest.  ``tests`` has the number of tests of each file."""
    costs = {file: count * _seconds(file) for file, count in tests.items()}
    ranked = sorted(costs, key=lambda file: (-costs[file], file))
    waiting = [file for file in ranked if file.startswith(REAL)]
    computing = [file for file in ranked if not file.startswith(REAL)]
    waits, computes = sum(costs[file] for file in waiting), sum(costs[file] for file in computing)
    waited = computed = 0.0
    while waiting or computing:
        is_turn = waited * computes * _SHARE_OF_COMPUTING <= computed * waits
        file = (waiting if waiting and (is_turn or not computing) else computing).pop(0)
        if file.startswith(REAL):
            waited += costs[file]
        else:
            computed += costs[file]
        yield file


def file_of(item: pytest.Item) -> str:
    """Return the file of a test, as pytest-xdist groups tests (``--dist loadfile``)."""
    return item.nodeid.partition("::")[0]


def _seconds(file: str) -> float:
    return next((seconds for folder, seconds in _S.items() if file.startswith(folder)), _OTHERS_S)
