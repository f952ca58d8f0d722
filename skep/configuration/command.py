"""``skep daemon``: the command, whose options are the settings of the configuration."""

import os
import sys
from typing import Any

import click

from skep.configuration.settings import SETTINGS, Setting
from skep.configuration.sources import DEFAULT_DAEMON_JSON, DEFAULT_TOML
from skep.patches.docstrings import WITHOUT_DOCSTRINGS

_WORDS = "words as they were typed"


class _Daemon(click.Command):
    """Keeps the words for the daemon's process, which reads them itself."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_WORDS] = tuple(args)
        return super().parse_args(ctx, args)


def _option(setting: Setting) -> click.Option:
    names = [*filter(None, [setting.short]), f"--{setting.name}"]
    text = f"{setting.help[0].upper()}{setting.help[1:]}."
    if setting.name == "debug":
        return click.Option(names, help=text, is_flag=False, flag_value="true", metavar="[BOOL]")
    return click.Option(names, help=text, multiple=setting.repeats, metavar=_metavar(setting.name))


_METAVARS = {
    "host": "URL",
    "trace-endpoint": "URL",
    "image-gc-high": "PERCENT",
    "image-gc-low": "PERCENT",
    "disk-pressure": "PERCENT",
    "store-quota": "SIZE",
    "label": "KEY=VALUE",
    "generic-resource": "KEY=VALUE",
    "log-opt": "KEY=VALUE",
    "default-address-pool": "KEY=VALUE,...",
    "credential-helper": "REGISTRY=NAME",
    "allow": "RIGHT",
    "dashboard": "ADDRESS",
    "manager": "ADDRESS",
    "insecure-registry": "ADDRESS",
    "registry-mirror": "URL",
    "metrics-host": "NAME",
    "engine-socket": "FILE",
    "acme-dns-hook": "FILE",
    "dashboard-public": "BOOL",
    "executor": "oci|process",
    "encryption": "auto|kernel|wireguard-go",
    "behind-nat": "auto|no|NAME",
    "log-format": "text|json",
}
_METAVARS_BY_END = {
    "addr": "ADDRESS",
    "port": "PORT",
    "dir": "DIRECTORY",
    "cert": "FILE",
    "key": "FILE",
    "ca": "FILE",
}


def _metavar(name: str) -> str:
    """Return the name of the option's value in the help."""
    return _METAVARS.get(name) or _METAVARS_BY_END.get(name.rpartition("-")[2], "NAME")


def _former(setting: Setting) -> click.Option:
    return click.Option([f"--{setting.former}"], hidden=True)


@click.command(
    cls=_Daemon,
    params=[
        click.Option(["--config"], metavar="FILE", help=f"Configuration file ({DEFAULT_TOML})."),
        click.Option(
            ["--daemon-json"],
            metavar="FILE",
            help=f"Docker's configuration file ({DEFAULT_DAEMON_JSON}). Use '' to read none.",
        ),
        click.Option(
            ["--rootless"],
            is_flag=True,
            help="Run as an ordinary user, in a user namespace. State is in ~/.local/share/skep by default, "
            "the API socket in $XDG_RUNTIME_DIR, and the configuration file in ~/.config/skep.",
        ),
        *map(_option, SETTINGS),
        *(_former(setting) for setting in SETTINGS if setting.former),
    ],
)
@click.pass_context
def daemon(ctx: click.Context, /, **_: Any) -> None:
    """Run this machine's node.

    Each option is also a key of the configuration file. Options override the file. The systemd unit runs this command.

    \b
    Examples:
      skep daemon
      skep daemon --config /etc/skep/skep.toml --debug
      skep daemon --rootless
      skep daemon --engine-socket /var/run/docker.sock --label zone=inner
    """
    # Use a new interpreter, because all forked node processes would otherwise hold click and these modules in memory.
    # Positions of columns, which tracebacks would underline, take 1 MB of code objects, and docstrings 3 MB.
    interpreter = (sys.executable, "-P", "-X", "no_debug_ranges", "-X", WITHOUT_DOCSTRINGS)
    os.execv(sys.executable, (*interpreter, "-m", "skep.daemon", *ctx.meta[_WORDS]))
