"""``skep rebalance``: what the command shows of a plan, and what it refuses."""

from typing import Any

from click.testing import CliRunner

from skep.cli.main import main
from skep.cli.maintain.rebalance import planned
from skep.cli.output import Screen

SPREAD = {"SourceBefore": 3, "TargetBefore": 0, "SourceAfter": 2, "TargetAfter": 1}
MOVE = {"Service": "web", "Slot": 3, "SourceName": "n1", "TargetName": "n3", "Own": SPREAD}
MOVE |= {"Every": SPREAD | {"SourceBefore": 5, "SourceAfter": 4, "TargetBefore": 4, "TargetAfter": 5}}


def lines(*moves: dict[str, Any], held: str = "", **record: Any) -> list[str]:
    rebalancing = {"AfterReturnS": 0, "Last": ""} | record
    return list(planned({"Moves": [*moves], "Rebalancing": rebalancing, "Held": held}).lines(Screen()))


def test_a_plan_without_moves_says_so() -> None:
    assert lines() == ["No moves: tasks are spread.", "  after nodes return: nothing moves by itself"]


def test_each_move_is_shown_with_what_it_gains() -> None:
    shown = lines(MOVE, AfterReturnS=600)
    assert shown[:2] == [
        "1 move would spread tasks more evenly.",
        "  after nodes return: rebalanced 10m later",
    ]
    assert shown[-1].split() == ["web.3", "n1", "n3", "of", "web", "3:0", "→", "2:1"]


def test_a_run_and_what_holds_it_back_are_shown() -> None:
    run = {
        "StartedAt": "2026-11-28T00:00:00.65213731Z",
        "By": "ada",
        "Moved": 2,
        "Waiting": "the cluster is frozen",
    }
    shown = lines(MOVE, held="the cluster is frozen", Run=run)
    assert "  in progress since 2026-11-28 00:00 UTC by ada: 2 moves begun" in shown
    assert "  waiting: the cluster is frozen" in shown
    assert "  the cluster is frozen: no task is moved until then" in shown
    assert "  last rebalance: 3 moves" in lines(Last="3 moves")


def test_apply_and_stop_exclude_each_other() -> None:
    done = CliRunner().invoke(main, ["--host", "unix:///nowhere", "rebalance", "--apply", "--stop"])
    assert (done.exit_code, "exclude each other" in done.output) == (2, True)
