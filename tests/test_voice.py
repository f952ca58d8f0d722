"""The check of wordings and of commit subjects."""

from pathlib import Path

import pytest

from docs.voice import CODE_RULES, ROOT, Measured, Place, risen, subject_faults


def rates_of(*texts: str) -> dict[str, float]:
    return Measured([Place(ROOT / "a.py", 1, text) for text in texts], CODE_RULES).rates()


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("Of the node.", "fragment"),
        ("Why a task ended.", "fragment"),
        ("The task; None: it has ended.", "none-colon"),
        ("It gives the last line.", "gives"),
        ("Send what is left.", "what-is"),
        ("There is no task, and it is no manager.", "is-no"),
        ("No task runs any more.", "any-more"),
    ],
)
def test_a_wording_is_counted_by_its_rule(text: str, rule: str) -> None:
    assert rates_of(text)[rule] > 0
    assert rates_of("Return the tasks of a node.")[rule] == 0


def test_a_rate_may_fall_and_not_rise() -> None:
    kept = {"skep": {"gives": 2.0, "goes": 1.0}}
    assert risen({"skep": {"gives": 1.5, "goes": 1.0}}, kept) == []
    assert risen({"skep": {"gives": 2.01, "goes": 0.0}}, kept) == [("skep", "gives")]
    assert risen({"new": {"gives": 0.1}}, kept) == [("new", "gives")]


def test_a_place_is_named_by_its_file_line_and_text() -> None:
    place = Place(ROOT / "skep" / "node" / "node.py", 7, "Of the node.")
    assert Measured([place], CODE_RULES).matching("fragment") == [place]
    assert str(place) == f"{Path('skep/node/node.py')}:7: Of the node."


@pytest.mark.parametrize(
    ("subject", "is_fault"),
    [
        ("scheduler: keep draining nodes out of global services", False),
        ("engine, cli: show the last line of output", False),
        ("Scheduler: keep draining nodes out", True),
        ("keep draining nodes out of global services", True),
        (f"docs: {'x' * 72}", True),
    ],
)
def test_a_subject_has_an_area_and_fits_a_line(subject: str, is_fault: bool) -> None:
    assert bool(subject_faults([subject])) is is_fault
