"""Signals by the names users give them."""

import signal

from skep.errors import InvalidArgument


def signal_number(name: str) -> int:
    """The number of ``SIGTERM``, ``TERM``, ``RTMIN+3`` or ``15``.

    Raises: InvalidArgument, with Docker's words: there is no such signal.
    """
    word = name.strip().upper().removeprefix("SIG")
    base, _, offset = word.partition("+")
    try:
        if word.isascii() and word.isdigit():
            number = int(word)
        elif base == "RTMIN" and offset:
            number = signal.SIGRTMIN + int(offset)
        else:
            number = signal.Signals[f"SIG{word}"].value
    except (KeyError, ValueError) as error:
        raise InvalidArgument(f"Invalid signal: {name}") from error
    if not 1 <= number <= signal.SIGRTMAX:
        raise InvalidArgument(f"Invalid signal: {name}")
    return number
