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


def ends_pause(number: int, stop_signal: str) -> bool:
    """Whether a paused container goes on when it is sent a signal: any one if it has no stop signal of its own.

    Source: moby 24.0, daemon/kill.go (killWithSignal).
    """
    return not stop_signal or number in (signal.SIGKILL, signal_number(stop_signal))
