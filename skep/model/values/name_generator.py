"""Readable names for services and plain containers without a name."""

from collections.abc import Callable
from random import Random

NameSource = Callable[[], str]
"""Returns another readable name at each call."""

_ATTEMPTS_WITHOUT_NUMBER = 10
"""Attempts until a number is appended, because most names are taken by then."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_ADJECTIVES = _words("""
    amber ample autumn balmy bold brave breezy bright brisk calm candid clear clever cosy crisp dapper dewy eager
    early fabled fair fleet fond frank gentle gilded glad golden hardy hazel honest humble jolly keen kind lively
    loyal lucid mellow merry mild mossy nimble noble placid plucky proud quiet rapid ready rosy rustic serene
    sharp silver sleek snug spry steady sunny swift tidy vivid warm witty zesty
""")
_NOUNS = _words("""
    alder ash aster balm basil beech birch borage bramble briar broom cedar cherry clover comfrey cowslip crocus
    daisy elder elm fennel fern foxglove gorse hawthorn heather holly hyssop ivy juniper larch laurel lavender
    lilac linden lupin maple marjoram meadow melissa mint myrtle oak orchard pear phacelia pine plum poppy
    primrose quince reed rosemary rowan rush sage sorrel tansy teasel thistle thyme vetch viola willow yarrow yew
""")


def names_from(random: Random) -> NameSource:
    """Return a source of names such as ``mellow_clover``."""
    return lambda: f"{random.choice(_ADJECTIVES)}_{random.choice(_NOUNS)}"


def free_name(new_name: NameSource, is_taken: Callable[[str], bool], attempts: int) -> str | None:
    """Return an unused name, with a number appended after a few attempts, or None if all attempts fail."""
    for attempt in range(attempts):
        name = new_name() if attempt < _ATTEMPTS_WITHOUT_NUMBER else f"{new_name()}{attempt}"
        if not is_taken(name):
            return name
    return None
