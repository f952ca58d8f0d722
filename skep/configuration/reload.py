"""What a running node takes over when its configuration is read again (SIGHUP)."""

import msgspec

from skep.configuration.configuration import Configuration
from skep.configuration.settings import SETTINGS


class Reload(msgspec.Struct, frozen=True):
    """``configuration`` is the running one with the changes that need no restart."""

    configuration: Configuration
    reloaded: tuple[str, ...]
    needs_restart: tuple[str, ...]


def reload(running: Configuration, written: Configuration) -> Reload:
    """Compare what runs with what is written now; names in the order of ``SETTINGS``."""
    changed = [
        setting
        for setting in SETTINGS
        if getattr(running, setting.attribute) != getattr(written, setting.attribute)
    ]
    taken = [setting for setting in changed if setting.reloads]
    return Reload(
        msgspec.structs.replace(running, **{s.attribute: getattr(written, s.attribute) for s in taken}),
        tuple(setting.toml_key for setting in taken),
        tuple(setting.toml_key for setting in changed if not setting.reloads),
    )
