"""``skep verify``: what the command and ``skep explain`` show of violated invariants, and the exit code."""

from typing import Any

from skep.cli.output import Screen
from skep.cli.see.verify import VIOLATED, about, verified

VIOLATION = {
    "Rule": "slot",
    "Text": "slot 1 of web is filled by ['t1', 't2']",
    "Meaning": "The service runs more tasks than its spec says.",
    "Action": "Scale the service down and up again.",
    "Subjects": ["t1", "t2", "web"],
    "Since": "",
}


def an_answer(*violations: dict[str, Any], count: int = 0) -> dict[str, Any]:
    return {
        "Violations": [*violations],
        "Count": count or len(violations),
        "Rules": 14,
        "Seconds": 0.2,
    }


def lines(answer: dict[str, Any]) -> list[str]:
    return list(verified(answer).lines(Screen()))


def test_a_cluster_without_violations_says_so_and_exits_with_0() -> None:
    assert verified(an_answer()).exit_code == 0
    assert lines(an_answer()) == ["No invariant is violated (14 rules in 0.2 s)."]


def test_a_violation_is_shown_with_its_meaning_and_what_to_do() -> None:
    assert verified(an_answer(VIOLATION)).exit_code == VIOLATED
    shown = lines(an_answer(VIOLATION, count=3))
    assert shown[0] == "3 violations (14 rules in 0.2 s)"
    assert shown[2] == "slot: slot 1 of web is filled by ['t1', 't2']"
    assert shown[3:5] == [f"  {VIOLATION['Meaning']}", f"  {VIOLATION['Action']}"]
    assert shown[-1] == "and 2 more"


def test_explain_shows_the_violations_of_its_object_only() -> None:
    assert list(about([VIOLATION], ["other"])) == []
    first, second = about([VIOLATION], ["web"])
    assert first == f"  violates the invariant slot: {VIOLATION['Text']}"
    assert second.strip() == f"{VIOLATION['Meaning']} {VIOLATION['Action']}"
