"""Security options of containers, as in ``docker run --security-opt``.  Pure."""

from collections.abc import Sequence
from typing import Final, NamedTuple

from skep.api.formats.gosyntax import BOOLEANS
from skep.engine.confinement import apparmor
from skep.engine.containers.request import refused
from skep.errors import InvalidArgument

_SECURITY_FLAGS: Final = {
    "no-new-privileges": "no-new-privileges=true",
    "writable-cgroups": "writable-cgroups=true",
    "disable": "label=disable",
}
"""Full form of options that may be written without a value."""


class SecurityOptions(NamedTuple):
    """Parsed ``--security-opt`` options."""

    seccomp: str = "default"
    apparmor: str = "default"
    no_new_privileges: bool = False


def security_options(options: Sequence[str]) -> SecurityOptions:
    """Parse security options.  Raises: InvalidArgument; Unimplemented: an option is not supported.

    Source: moby, daemon/daemon_unix.go (parseSecurityOpt).
    """
    found = SecurityOptions()
    for given in options:
        option = _SECURITY_FLAGS.get(given, given)
        name, separator, value = option.partition("=" if "=" in option else ":")
        if not separator:
            raise InvalidArgument(f'invalid --security-opt 1: "{given}"')
        match name, BOOLEANS.get(value):
            case "no-new-privileges", bool() as is_on:
                found = found._replace(no_new_privileges=is_on)
            case "seccomp", _:
                found = found._replace(seccomp="default" if value in ("", "builtin") else value)
            case "apparmor", _:
                found = found._replace(
                    apparmor="default" if value in ("", apparmor.DEFAULT_PROFILE) else value
                )
            case ("label", _) | ("writable-cgroups", True):
                if value != "disable":  # SELinux labels are not supported here
                    raise refused(f"--security-opt {name}")
            case "writable-cgroups", False:
                pass
            case _:
                raise InvalidArgument(f'invalid --security-opt 2: "{given}"')
    return found
