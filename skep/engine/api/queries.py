"""Query parameters, with Docker's errors for invalid ones."""

from aiohttp import web

from skep.errors import InvalidArgument

_DIGITS_MAX = 18
"""Number of digits with which a number always fits into 64 bits."""


def integer(request: web.Request, name: str, default: int | None = None) -> int:
    """Return an integer.  Raises: InvalidArgument: it is invalid, or missing without a ``default``."""
    text = request.query.get(name, "")
    if not text and default is not None:
        return default
    digits = text.removeprefix("-").removeprefix("+")
    if not digits.isascii() or not digits.isdigit() or len(digits) > _DIGITS_MAX:
        raise InvalidArgument(f'strconv.Atoi: parsing "{text}": invalid syntax')
    return int(text)
