"""Files of real processes run among those that compute, and end before them."""

from collections import Counter
from itertools import pairwise

from tests.support.harness.order import order


def files(folder: str, sizes: list[int]) -> Counter[str]:
    return Counter({f"tests/{folder}/test_{number}.py": size for number, size in enumerate(sizes)})


def test_each_file_is_there_once_the_largest_of_its_kind_first() -> None:
    tests = files("integration", [3, 9, 1]) + files("unit", [50, 70])
    found = list(order(tests))
    assert sorted(found) == sorted(tests)
    assert [file for file in found if "unit" in file] == ["tests/unit/test_1.py", "tests/unit/test_0.py"]
    assert [tests[file] for file in found if "integration" in file] == [9, 3, 1]


def test_files_of_real_processes_are_spread_and_the_last_ones_compute() -> None:
    found = list(order(files("integration", [10] * 50) + files("unit", [10] * 500)))
    places = [place for place, file in enumerate(found) if "integration" in file]
    assert max(after - before for before, after in pairwise(places)) <= 12
    assert 430 <= places[-1] <= 510


def test_one_kind_alone_is_in_its_order() -> None:
    for folder in ("integration", "unit"):
        assert len(list(order(files(folder, [1, 2, 3])))) == 3
    assert list(order(Counter())) == []
