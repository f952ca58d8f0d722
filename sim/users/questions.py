"""Questions to ``skep what-if`` about a simulated cluster, also in the middle of faults and changes."""

from collections.abc import Callable

from skep.manager.what_if.answer import Question, SupposedOutcome
from skep.manager.what_if.rehearsal import Rehearsal
from skep.store.interface import View


def ask(view: View, suppose: Callable[[Rehearsal], None], now_ns: int = 0) -> tuple[SupposedOutcome, float]:
    """Return the answer, and the seconds until nothing is left to do.  Raises: SkepError: a refusal."""
    question = Question(Rehearsal(view, now_ns), lambda _: True)
    for _ in question.begin():
        pass
    suppose(question.rehearsal)
    for _ in question.settle():
        pass
    return question.answer, question.rehearsal.clock.monotonic()
