"""Signals by the names users give them."""

import signal

from skep.errors import InvalidArgument


def signal_number(name: str) -> int:
    """The number of ``SIGTERM``, ``TERM`` or ``15``.  Raises: InvalidArgument, with Docker's words."""
    upper = name.strip().upper()
    try:
        if upper.isascii() and upper.isdigit():
            return signal.Signals(int(upper)).value
        if upper.startswith(("RTMIN+", "SIGRTMIN+")):
            return signal.Signals(signal.SIGRTMIN + int(upper.partition("+")[2])).value
        return signal.Signals[upper if upper.startswith("SIG") else f"SIG{upper}"].value
    except (KeyError, ValueError) as error:
        raise InvalidArgument(f"Invalid signal: {name}") from error
