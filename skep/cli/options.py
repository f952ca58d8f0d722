"""Options that several commands have, with one spelling and one type each."""

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from skep.model.values.times import SECOND_NS, duration_ns

F = TypeVar("F", bound=Callable[..., Any])

DAY_S = 24 * 3600.0
"""Seconds in a day, a unit that Go's durations lack."""
_DAYS = re.compile(r"(?P<days>[0-9]+)d(?P<rest>.*)")
_PLAIN = re.compile(r"[0-9]+(?:\.[0-9]+)?")


class Duration(click.ParamType[float]):
    """A time with its unit, such as ``90s``, ``10m``, ``2h`` or ``30d``. The value is in seconds."""

    name = "duration"

    def __init__(self, *, plain_s: float = 1.0, least_s: float = 0.0, most_s: float | None = None) -> None:
        """``plain_s``: unit in seconds of a number without a unit, for compatibility with earlier versions."""
        self._plain_s = plain_s
        self._least_s = least_s
        self._most_s = most_s

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the seconds. Fails with an example if the text is invalid or out of range."""
        if isinstance(value, float):
            return value
        seconds = self._seconds(str(value).strip())
        if seconds is None:
            self.fail(
                f"{value!r} is not a duration. Use a number with a unit, such as 90s, 10m or 2h.", param, ctx
            )
        if seconds < self._least_s or (self._most_s is not None and seconds > self._most_s):
            bounds = f"at least {_text(self._least_s)}"
            if self._most_s is not None:
                bounds = f"from {_text(self._least_s)} to {_text(self._most_s)}"
            self.fail(f"{value!r} is out of range. Use a duration {bounds}.", param, ctx)
        return seconds

    def _seconds(self, text: str) -> float | None:
        if _PLAIN.fullmatch(text):
            return float(text) * self._plain_s
        days_s = 0.0
        if found := _DAYS.fullmatch(text):
            days_s, text = int(found["days"]) * DAY_S, found["rest"] or "0s"
        ns = duration_ns(text)
        return days_s + ns / SECOND_NS if ns is not None else None


def _text(seconds: float) -> str:
    return f"{seconds / DAY_S:g}d" if seconds % DAY_S == 0 and seconds else f"{seconds:g}s"


def timeout(default: str = "10m", help: str = "Longest time to wait.") -> Callable[[F], F]:
    """Return the option ``--timeout DURATION`` for a command that waits."""
    return click.option(
        "--timeout", type=Duration(), default=default, show_default=True, metavar="DURATION", help=help
    )


def two_revisions(command: F) -> F:
    """Add the optional arguments ``first`` and ``second``, the numbers of two revisions to compare."""
    for name in ("second", "first"):  # click puts each argument before the earlier ones
        command = click.argument(name, type=click.IntRange(1), required=False)(command)
    return command


detach = click.option("-d", "--detach", is_flag=True, help="Do not wait.")
"""The option ``--detach`` for a command that otherwise waits."""

override_freeze = click.option("--override-freeze", is_flag=True, help="Override a strict freeze.")
"""The option ``--override-freeze`` for a command that a strict freeze refuses."""

yes = click.option("-y", "--yes", is_flag=True, help="Skip the confirmation prompt.")
"""The option ``--yes`` for a command that asks before it changes something."""


def dry_run(help: str) -> Callable[[F], F]:
    """Return the option ``--dry-run`` for a command that can show its steps without taking them."""
    return click.option("--dry-run", is_flag=True, help=help)


def accepting(former: Mapping[str, str], base: type[click.Command] = click.Command) -> type[click.Command]:
    """Return a command class that also takes former spellings of options, without listing them.

    Args:
        former: Present options by former option.  A present one may include a value, such as ``--output=json`` for
            ``--json``.
        base: The class to extend.
    """

    class Accepting(base):  # type: ignore[valid-type,misc]
        def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
            return list(super().parse_args(ctx, [_present(former, word) for word in args]))

    return Accepting


def _present(former: Mapping[str, str], word: str) -> str:
    name, equals, value = word.partition("=")
    return f"{former[name]}{equals}{value}" if name in former else word
