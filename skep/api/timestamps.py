"""``since`` and ``until`` of streams: Unix time, ``1763600000.123456789``.

Source: moby 20.10, api/types/time/timestamp.go (ParseTimestamps).
"""

import re

from skep.api.errors import Untranslated
from skep.model.times import SECOND_NS

_NUMBER = re.compile(r"[+-]?[0-9]{1,18}")


def parse_unix_time(text: str) -> int | None:
    """Nanoseconds since the epoch; None for an empty text.

    Raises:
        Untranslated: it is no Unix time, in Go's words.
    """
    if not text:
        return None
    seconds, point, fraction = text.partition(".")
    nanoseconds = int(_number(fraction) * 10.0 ** (9 - len(fraction))) if point else 0
    return _number(seconds) * SECOND_NS + nanoseconds


def _number(word: str) -> int:
    if not _NUMBER.fullmatch(word):
        raise Untranslated(f'strconv.ParseInt: parsing "{word}": invalid syntax')
    return int(word)
