"""Parses users' names of signals."""

import signal

from skep.errors import InvalidArgument


def signal_number(name: str) -> int:
    """Return the number of ``SIGTERM``, ``TERM``, ``RTMIN+3`` or ``15``.

    Raises: InvalidArgument, in Docker's words: no such signal.
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
    """Return whether a signal resumes a paused container.  If the container has no stop signal, every signal does.

    Source: moby 24.0, daemon/kill.go (killWithSignal).
    """
    return not stop_signal or number in (signal.SIGKILL, signal_number(stop_signal))
