"""The changes that a running node applies when it reads its configuration again (SIGHUP)."""

import msgspec

from skep.configuration.configuration import Configuration
from skep.configuration.settings import SETTINGS


class Reload(msgspec.Struct, frozen=True):
    """A running configuration with the changes that need no restart applied, and the names of the changed settings."""

    configuration: Configuration
    reloaded: tuple[str, ...]
    needs_restart: tuple[str, ...]


def reload(running: Configuration, written: Configuration) -> Reload:
    """Compare the running configuration with the written one.  Names are in the order of ``SETTINGS``."""
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
