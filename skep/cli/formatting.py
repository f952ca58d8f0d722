"""Times and numbers for people."""

_UNITS = ((86_400, "d"), (3_600, "h"), (60, "m"))


def duration(seconds: float) -> str:
    """``3 s``, ``4m 10s``, ``2h 5m``, ``3d 4h``: the two largest units."""
    whole = max(round(seconds), 0)
    for size, unit in _UNITS:
        if whole >= size:
            count, rest = divmod(whole, size)
            smaller = {"d": (3_600, "h"), "h": (60, "m"), "m": (1, "s")}[unit]
            second = rest // smaller[0]
            return f"{count}{unit} {second}{smaller[1]}" if second else f"{count}{unit}"
    return f"{whole} s"


def counted(number: int, noun: str) -> str:
    """``1 node``, ``2 nodes``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
