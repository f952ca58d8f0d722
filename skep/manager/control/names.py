"""Names of objects: what they may be, and readable ones for services created without.

Source: swarmkit, manager/controlapi/common.go (validateAnnotations, validateConfigOrSecretAnnotations).
"""

import re
from collections.abc import Callable
from random import Random

from skep.errors import InvalidArgument

_DNS_NAME = re.compile(r"[a-zA-Z0-9](?:[-_]*[A-Za-z0-9]+)*")
_DNS_NAME_LENGTH_MAX = 63
_FILE_NAME = re.compile(r"[a-zA-Z0-9]+(?:[a-zA-Z0-9-_.]*[a-zA-Z0-9])?")
_FILE_NAME_LENGTH_MAX = 64


def check_dns_name(name: str) -> None:
    """Refuse what cannot be the name of a service or network.  Raises: InvalidArgument."""
    if not name:
        raise InvalidArgument("meta: name must be provided")
    # The length first: the pattern takes time that grows with the square of it.
    if len(name) <= _DNS_NAME_LENGTH_MAX and not _DNS_NAME.fullmatch(name):
        raise InvalidArgument("name must be valid as a DNS name component")
    if len(name) > _DNS_NAME_LENGTH_MAX:
        if re.search(r"[^-_A-Za-z0-9]|^[-_]|[-_]$", name):
            raise InvalidArgument("name must be valid as a DNS name component")
        raise InvalidArgument("name must be 63 characters or fewer")


def check_file_name(name: str) -> None:
    """Refuse what cannot be the name of a secret or config.  Raises: InvalidArgument."""
    if not name:
        raise InvalidArgument("name must be provided")
    if len(name) > _FILE_NAME_LENGTH_MAX or not _FILE_NAME.fullmatch(name):
        raise InvalidArgument(
            "invalid name, only 64 [a-zA-Z0-9-_.] characters allowed, "
            "and the start and end character must be [a-zA-Z0-9]"
        )


NameSource = Callable[[], str]
"""Gives another readable name at each call."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_HOW = _words("""
    amber ample autumn balmy bold brave breezy bright brisk calm candid clear clever cosy crisp dapper dewy eager
    early fabled fair fleet fond frank gentle gilded glad golden hardy hazel honest humble jolly keen kind lively
    loyal lucid mellow merry mild mossy nimble noble placid plucky proud quiet rapid ready rosy rustic serene
    sharp silver sleek snug spry steady sunny swift tidy vivid warm witty zesty
""")
_WHO = _words("""
    alder ash aster balm basil beech birch borage bramble briar broom cedar cherry clover comfrey cowslip crocus
    daisy elder elm fennel fern foxglove gorse hawthorn heather holly hyssop ivy juniper larch laurel lavender
    lilac linden lupin maple marjoram meadow melissa mint myrtle oak orchard pear phacelia pine plum poppy
    primrose quince reed rosemary rowan rush sage sorrel tansy teasel thistle thyme vetch viola willow yarrow yew
""")


def names_from(random: Random) -> NameSource:
    """Names such as ``mellow_clover``: what a bee may find, and how."""
    return lambda: f"{random.choice(_HOW)}_{random.choice(_WHO)}"
