"""The file format of systemd's units: sections of settings, some of them repeated."""

from collections.abc import Mapping

import msgspec

from skep.errors import InvalidArgument


class Unit(msgspec.Struct, frozen=True):
    """One unit file.  ``settings`` has the values of each section and key, in order."""

    name: str
    settings: Mapping[tuple[str, str], tuple[str, ...]]

    def all(self, section: str, key: str) -> tuple[str, ...]:
        """Return the values of a setting.  An empty value in the file discards those before it."""
        return self.settings.get((section, key), ())

    def last(self, section: str, key: str) -> str:
        """Return the last value of a setting, the one in effect, or an empty text if it is not set."""
        found = self.all(section, key)
        return found[-1] if found else ""


def unit_of(text: str, name: str) -> Unit:
    """Read a unit file.  Raises: InvalidArgument: a line is neither a section nor a setting; it names the line.

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
            raise InvalidArgument(f"{name}:{began}: expected [SECTION] or KEY=VALUE, not {line!r}")
        before = settings.get((section, key), ())
        settings[section, key] = (*before, value) if value else ()
    return Unit(name, settings)
