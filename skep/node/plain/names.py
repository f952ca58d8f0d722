"""Names for containers that were given none."""

import re
from collections.abc import Callable

from skep.errors import InvalidArgument, ResourceExhausted

_NAME = re.compile(r"/?[a-zA-Z0-9][a-zA-Z0-9_.-]+")
_TRIES_MAX = 100
_KINDS = (
    *(
        "amber",
        "bold",
        "bright",
        "busy",
        "calm",
        "clever",
        "crisp",
        "dusky",
        "eager",
        "early",
        "fair",
        "gentle",
    ),
    *("golden", "happy", "honest", "humble", "keen", "kind", "lively", "lucky", "mellow", "mild", "nimble"),
    *(
        "patient",
        "proud",
        "quick",
        "quiet",
        "rapid",
        "ready",
        "silent",
        "silver",
        "sleepy",
        "steady",
        "sunny",
    ),
    *("swift", "tidy", "warm", "wild", "wise", "witty"),
)
_THINGS = (
    *("acacia", "aster", "basil", "birch", "borage", "briar", "clover", "comb", "daisy", "drone", "fennel"),
    *("foxglove", "heath", "heather", "hive", "honey", "ivy", "larch", "lavender", "lilac", "lime", "linden"),
    *(
        "mallow",
        "maple",
        "meadow",
        "mint",
        "nectar",
        "orchard",
        "pollen",
        "poppy",
        "queen",
        "rosemary",
        "sage",
    ),
    *("sedge", "swarm", "thistle", "thyme", "vetch", "willow", "yarrow"),
)


def checked(name: str) -> str:
    """``name`` as it is kept.  Raises: InvalidArgument, in Docker's words."""
    if not _NAME.fullmatch(name):
        raise InvalidArgument(f"Invalid container name ({name}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed")
    return name.removeprefix("/")


def new_name(is_taken: Callable[[str], bool], chance: Callable[[], float]) -> str:
    """A name that nobody has.  ``chance``: in [0, 1), another one at each call.

    Raises: ResourceExhausted: none was found.
    """
    for attempt in range(_TRIES_MAX):
        words = (_KINDS[int(chance() * len(_KINDS))], _THINGS[int(chance() * len(_THINGS))])
        name = "_".join(words) + (str(int(chance() * 10**6)) if attempt > _TRIES_MAX // 10 else "")
        if not is_taken(name):
            return name
    raise ResourceExhausted("no free name was found: give the container one (--name)")
