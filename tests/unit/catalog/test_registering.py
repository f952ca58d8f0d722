"""How results of checks change the state of a registered service."""

from skep.catalog.registering import CheckRules, CheckState, after_check

RULES = CheckRules(rise=2, fall=3)


def states(results: str) -> str:
    """The state after each result: ``+`` for a pass and up, ``-`` for a failure and down."""
    state, seen = CheckState(), ""
    for result in results:
        state = after_check(state, passed=result == "+", rules=RULES)
        seen += "+" if state.is_up else "-"
    return seen


def test_it_is_up_after_some_passes_and_down_after_some_failures_in_a_row() -> None:
    assert states("++---") == "-+++-"
    assert states("+-++") == "---+"
    assert states("++--+--") == "-++++++"
