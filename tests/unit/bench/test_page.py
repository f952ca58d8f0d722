"""Which result a figure comes from, how rows are ordered, and what is written into pages."""

import re

import msgspec
import pytest

from bench.page import (
    FIGURES,
    Figure,
    Result,
    Wanted,
    alone_section,
    fault_run_text,
    figures,
    filled,
    page,
    parsed,
    selected,
    table,
)

WANTED = Wanted("task-memory", "memory for each task", "memory per task, MiB", "MiB", True)
STREAM = Wanted(
    "stream", "one stream", "stream, Gbit/s", "Gbit/s", False, ("Docker's overlay", "overlay"), True
)


def result(
    name: str, docker: list[float], skep: list[float], busy: float = 0.0, metric: str = WANTED.metric
) -> Result:
    values = {metric: {side: some for side, some in (("docker", docker), ("skep", skep)) if some}}
    return Result(
        name,
        f"{name} UTC",
        "c0ffee",
        "2 processors",
        "6.18",
        {"docker": "dockerd 26.1"},
        values,
        {metric: busy},
    )


def measured(wanted: Wanted, docker: float, skep: float) -> Figure:
    return Figure(wanted, [docker], [skep], result("2026-11-27", [docker], [skep]))


def test_the_newest_result_counts_even_if_it_is_worse_and_smaller() -> None:
    older, newer = result("2026-11-20", [2.0] * 7, [0.3] * 7), result("2026-11-27", [2.0] * 3, [0.4] * 3)
    found = selected(WANTED, [older, newer])
    assert found is not None
    assert (found.result.name, found.text("skep"), found.n) == ("2026-11-27", "0.4 MiB", 3)


def test_a_figure_counts_pairs_even_if_a_pair_has_several_values() -> None:
    text = "2 processors, Linux 6.18.44. 1 pairs"
    data = {"date": "2026-11-27", "commit": "c0ffee", "noise": [], "pairs": 1}
    one = parsed(
        "2026-11-27", text, {**data, "values": {WANTED.metric: {"docker": [2.0, 3.0], "skep": [0.3, 0.4]}}}
    )
    assert one is not None
    found = selected(WANTED, [one])
    assert found is not None
    assert found.n == 1
    assert "1 of 1 figures have fewer than 7 pairs" in page([found], "No request failed.")


@pytest.mark.parametrize(
    "newer",
    [
        result("2026-11-27", [2.0], [0.4], busy=0.9),
        result("2026-11-27", [2.0], []),
        result("2026-11-27", [], [0.4]),
        result("2026-11-27", [2.0], [0.4], metric="another"),
    ],
    ids=["busy machine", "without Skep", "without Docker", "another metric"],
)
def test_a_result_that_says_nothing_leaves_the_older_one(newer: Result) -> None:
    found = selected(WANTED, [result("2026-11-20", [2.0], [0.3]), newer])
    assert found is not None
    assert found.result.name == "2026-11-20"
    assert selected(WANTED, [newer]) is None


def test_rows_in_which_skep_loses_most_come_first() -> None:
    metrics = {"memory idle, MiB": 1.2, "memory per task, MiB": 0.1, "POST /services/create, ms p50": 2.0}
    results = [
        result(f"2026-11-2{n}", [1.0], [skep], metric=name) for n, (name, skep) in enumerate(metrics.items())
    ]
    assert [one.wanted.key for one in figures(results)] == ["create-request", "single-memory", "task-memory"]


def test_a_lower_throughput_loses() -> None:
    assert measured(STREAM, 14.0, 7.0).ratio == 2
    assert measured(WANTED, 14.0, 7.0).ratio == 0.5
    (*_, row) = table([measured(STREAM, 14.0, 7.0)])
    assert row.startswith("| one stream | **14 Gbit/s** | 7 Gbit/s | 2.00 | 1 |")


def test_an_odd_value_is_in_the_spread_and_not_in_the_median() -> None:
    one = Figure(WANTED, [2.0, 2.0, 2.0], [0.3, 0.4, 9.0], result("2026-11-27", [], []))
    (*_, row) = table([one])
    assert "| **0.4 MiB** (0.3 to 9) |" in row


def test_both_forms_of_results_are_read() -> None:
    text = "# Networks\n\n2 processors, Linux 6.18.44-fc. 7 pairs.\n"
    pairs = {
        "date": "d",
        "commit": "c",
        "noise": [0.1, 0.3],
        "values": {"a": {"docker": [1.0], "skep": [2.0]}},
    }
    pairs["facts"] = {"docker": {"version": "dockerd 26.1"}}
    turns = {"date": "d", "commit": "c", "figures": [{"what": "b", "sides": {"x": [1.0]}, "busy": [0.5]}]}
    first, second = parsed("one", text, pairs), parsed("two", text, turns)
    assert first is not None
    assert second is not None
    assert (first.kernel, first.versions, first.busy) == (
        "6.18.44-fc",
        {"docker": "dockerd 26.1"},
        {"a": 0.2},
    )
    assert (second.values, second.busy) == ({"b": {"x": [1.0]}}, {"b": 0.5})
    assert parsed("three", text, [1, 2]) is None
    assert parsed("four", "a page without its machine", pairs) is None


def test_marked_figures_and_blocks_are_replaced_and_nothing_else() -> None:
    text = (
        "A task takes <!--task-memory.skep-->1 GiB<!---->, <!--task-memory.ratio--><!----> less than 1 GiB.\n"
        "<!-- figures: written by make bench-page -->\nold\n<!-- end -->\n"
    )
    assert filled(text, [measured(WANTED, 2.0, 0.5)], {"figures": "new\n"}) == (
        "A task takes <!--task-memory.skep-->0.5 MiB<!---->, <!--task-memory.ratio-->4 times<!----> less than 1 GiB.\n"
        "<!-- figures: written by make bench-page -->\n\nnew\n\n<!-- end -->\n"
    )
    with pytest.raises(KeyError, match="task-memory"):
        filled(text, [], {"figures": ""})


def test_the_page_says_how_many_figures_are_lost_and_how_many_have_few_pairs() -> None:
    found = [measured(WANTED, 2.0, 3.0), Figure(STREAM, [1.0] * 7, [2.0] * 7, result("2026-11-26", [], []))]
    text = page(found, "No request failed.")
    assert "loses in 1 of 2 figures" in text
    assert "1 of 2 figures have fewer than 7 pairs" in text
    assert "| `c0ffee` | 2 processors | 6.18 | 26.1 | not recorded |" in text


def test_a_newer_engine_has_a_table_of_its_own() -> None:
    machines = Result("2026-11-20", "d", "c", "2", "6", {"docker": "dockerd 20.10.24+dfsg1"}, {}, {})
    assert [one.is_of_newer_engine for one in (machines, result("2026-11-27", [], []))] == [False, True]
    text = page([Figure(STREAM, [1.0], [2.0], machines)], "No request failed.", [measured(WANTED, 2.0, 0.5)])
    (section,) = re.findall(r"^## With a newer Docker Engine\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    assert "Docker Engine 26.1," in section
    assert "| memory for each task | 2 MiB | **0.5 MiB** | 0.25 | 1 | [2](#results) |" in section
    assert "newer Docker Engine" not in page([measured(WANTED, 2.0, 0.5)], "No request failed.")


def test_one_container_is_compared_with_podman_too() -> None:
    three = {"docker": [0.5], "podman": [0.4, 0.2], "skep": [0.1]}
    values = {f"{what} of one container, s": three for what in ("start", "exec", "removal")}
    versions = {"docker": "Docker version 20.10.24+dfsg1", "podman": "podman version 4.3.1"}
    one = Result("2026-11-29-single", "d", "c", "2", "6", versions, values, dict.fromkeys(values, 0.0))
    text = alone_section([one, result("2026-11-30", [1.0], [1.0])])
    assert "Podman is 4.3.1, the Docker Engine 20.10.24+dfsg1, with 1 values of each system" in " ".join(
        text.split()
    )
    assert "| exec | 0.5 s | 0.3 s (0.2 to 0.4) | **0.1 s** |" in text
    busy = msgspec.structs.replace(one, busy=dict.fromkeys(values, 0.9))
    assert alone_section([busy]) == alone_section([]) == ""


def test_a_fault_run_is_told_with_its_failures() -> None:
    text = "# A day: 120 minutes, commit c0ffee\n\n1234 promised requests, 2 failed; 9 changes.\n"
    text += "| daemon killed | 3 | 1 s |\n| machine lost | 4 | 2 s |\n"
    told = " ".join(fault_run_text("day", text, "").split())
    assert told.startswith("In a [fault run of 120 minutes](bench/results/day.md) with 3 killed daemons")
    assert told.endswith("4 lost machines, 2 of 1,234 promised requests failed.")
    with pytest.raises(ValueError, match="machine lost"):
        fault_run_text("day", text.replace("lost", "off"), "")


def test_every_figure_has_a_key_of_its_own() -> None:
    assert len({one.key for one in FIGURES}) == len(FIGURES) >= 15
