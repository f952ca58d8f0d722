"""The file format of systemd's units: sections of settings, some of them several times."""

from collections.abc import Mapping

import msgspec

from skep.errors import InvalidArgument


class Unit(msgspec.Struct, frozen=True):
    """One unit file.  ``settings``: by section and key, their values in order."""

    name: str
    settings: Mapping[tuple[str, str], tuple[str, ...]]

    def all(self, section: str, key: str) -> tuple[str, ...]:
        """The values of a setting; an empty one takes back those before it."""
        return self.settings.get((section, key), ())

    def last(self, section: str, key: str) -> str:
        """The value that counts where there can be one only; empty: it is not set."""
        found = self.all(section, key)
        return found[-1] if found else ""


def unit_of(text: str, name: str) -> Unit:
    """Read a unit file.  Raises: InvalidArgument: it is none, with the line.

    Source: systemd.syntax(7).
    """
    settings: dict[tuple[str, str], tuple[str, ...]] = {}
    section, pending, began = "", "", 0
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if line.startswith(("#", ";")) or (not line and not pending):
            continue
        began = began if pending else number
        pending += line.removesuffix("\\") + (" " if line.endswith("\\") else "")
        if line.endswith("\\"):
            continue
        line, pending = pending.strip(), ""
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1]
            continue
        key, separator, value = (part.strip() for part in line.partition("="))
        if not separator or not key or not section:
            raise InvalidArgument(f"{name}:{began}: want [SECTION] or KEY=VALUE, not {line!r}")
        before = settings.get((section, key), ())
        settings[section, key] = (*before, value) if value else ()
    return Unit(name, settings)
