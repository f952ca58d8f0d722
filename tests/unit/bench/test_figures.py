"""How figures are judged, and which pairs count."""

from collections.abc import Mapping
from typing import NamedTuple

from bench import report
from bench.figures import Figure, alternate, at_quantile, measured_parts, ratio, side_by_side
from bench.machine import is_kept


def test_a_pair_on_a_busy_machine_is_repeated_but_no_more_often_than_there_are_pairs() -> None:
    for busy, tries in ((0.0, 7), (1.0, 14)):
        kept = tried = 0
        while kept < 7:
            tried += 1
            kept += is_kept(busy, tried, kept, 7)
        assert tried == tries


def test_a_ratio_is_taken_pair_by_pair() -> None:
    found = ratio(1, "stream", {"other": [1.0, 2.0, 4.0], "mine": [1.0, 1.8, 4.4]}, limit=0.95, is_least=True)
    assert found.values == (1.0, 0.9, 4.4 / 4.0)
    assert (found.value, found.holds) == (1.0, True)


def test_a_slow_one_in_a_hundred_is_what_p99_allows() -> None:
    values = [*[1.0] * 99, 9.0]
    assert (at_quantile(values, 0.99), at_quantile([*values, 9.0], 0.99)) == (1.0, 9.0)
    slow = Figure(number=9, what="answer", unit="ms", values=(1.0, 9.0), quantile=0.99, limit=1.0)
    assert (slow.value, slow.holds) == (9.0, False)


async def test_each_way_has_as_many_turns_first() -> None:
    asked: list[str] = []

    async def turn(way: str) -> float:
        asked.append(way)
        return float(len(asked))

    found = await alternate(["a", "b"], 1, 4, turn)
    assert asked == ["a", "b", "b", "a"] * 2
    assert found["a"] == found["b"] == 4.5


def test_an_earlier_commit_is_compared_turn_by_turn() -> None:
    values = {"docker": [4.0, 4.0, 4.0], "skep": [1.0, 2.0, 6.0], "before": [1.0, 1.0, 2.0]}
    rows = report.table({"create 1 to running, s": values, "remove 1": {"skep": [1.0]}}).splitlines()
    assert rows[0].endswith("| before | ratio to before |")
    assert rows[2].endswith("| kept | 1 (1 .. 2, n=3) | 2.00 |")
    assert rows[3].endswith("| – | – |")
    assert {row.count("|") for row in rows} == {9}


def test_without_an_earlier_commit_there_are_two_systems() -> None:
    rows = report.table({"crash": {"docker": [1.0], "skep": [0.5]}}).splitlines()
    assert "before" not in rows[0]
    assert {row.count("|") for row in rows} == {7}


class _Lab(NamedTuple):
    system: str


def test_each_system_is_measured_first_in_every_other_pair() -> None:
    asked: list[str] = []

    def measure(lab: _Lab) -> Mapping[str, float]:
        asked.append(lab.system)
        return {"took": float(len(asked))}

    sides, busy = side_by_side([_Lab("docker"), _Lab("skep")], 2, measure)
    assert asked[:4] == ["docker", "skep", "skep", "docker"]
    assert list(sides["took"]) == ["docker", "skep"]
    assert [len(values) for values in sides["took"].values()] == [len(busy)] * 2 == [2, 2]


def test_a_part_that_fails_is_named_and_the_others_go_on() -> None:
    def failing(pairs: int) -> list[Figure]:
        raise SystemExit(f"no result of {pairs} pairs")

    def working(pairs: int) -> list[Figure]:
        return [Figure(number=n, what="turn", unit="s", values=(1.0,) * pairs) for n in (0, 2, 1)]

    figures, notes = measured_parts({"logs": failing, "exec": working}, 3)
    assert [one.number for one in figures] == [1, 2, 0]
    assert notes == ["logs failed: no result of 3 pairs"]
