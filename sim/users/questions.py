"""Questions to ``skep what-if`` about a simulated cluster, also in the middle of faults and changes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from random import Random

from skep.errors import SkepError
from skep.manager.what_if.answer import Question, SupposedOutcome
from skep.manager.what_if.rehearsal import Rehearsal
from skep.manager.what_if.suppositions import drain, lose
from skep.model.values.ids import NodeId
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


def impossible_answers(view: View, nodes: Sequence[NodeId], random: Random, now_ns: int) -> Iterator[str]:
    """Ask what follows from the loss or the drain of a node, whatever the state is.  Yield what no answer may say."""
    supposed = random.choice((lose, drain))
    with suppress(SkepError):  # the drain is refused, as the real one would be
        answer, _ = ask(view, partial(supposed, nodes=[random.choice(nodes)]), now_ns)
        for one in answer.services:
            if not 0 <= one.lowest <= min(one.before, one.after):
                yield f"what-if: {one.name} has {one.before}, at least {one.lowest}, then {one.after} tasks"
