"""Numbers with their nouns, as texts for people."""


def counted(number: float, noun: str, several: str = "") -> str:
    """Return the number with its noun: ``1 node``, ``2 nodes``, ``0.5 CPUs``.

    Args:
        several: the plural, if it is not the noun with an ``s``.
    """
    shown = f"{number:g}" if isinstance(number, float) else str(number)
    return f"{shown} {noun if number == 1 else several or f'{noun}s'}"
