"""Names of containers: what they may be."""

import re

from skep.errors import InvalidArgument

_NAME = re.compile(r"/?[a-zA-Z0-9][a-zA-Z0-9_.-]+")


def checked(name: str) -> str:
    """``name`` as it is kept.  Raises: InvalidArgument, in Docker's words."""
    if not _NAME.fullmatch(name):
        raise InvalidArgument(f"Invalid container name ({name}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed")
    return name.removeprefix("/")
