"""``skep daemon``: runs one node.  Its flags are the configuration's, see ``skep daemon --help``."""

import os
import sys
from collections.abc import Sequence

import click


@click.command(
    context_settings={
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
        "help_option_names": [],
    },
    short_help="Run this machine's node (what the systemd unit starts).",
)
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
def daemon(flags: Sequence[str]) -> None:
    """Run this machine's node."""
    # In a new interpreter: all processes of the node would share click and these modules, which none of them uses.
    os.execv(sys.executable, (sys.executable, "-P", "-m", "skep.daemon", *flags))
