"""``skep upgrade``: the command.  ``upgrade`` carries it out."""

import asyncio
import subprocess
from pathlib import Path
from typing import Any

import click

from skep.cli import options
from skep.cli.endpoint import HostOptions
from skep.cli.maintain.upgrade import abort, carry_out, show_plan
from skep.cli.maintain.upgrade_means import Means
from skep.cli.maintain.upgrade_system import SystemMeans
from skep.cli.running import errors_shown
from skep.errors import InvalidArgument
from skep.linux.processes import boot_id

_WITHIN_S, _SYSTEM_WITHIN_S = 180.0, 900.0
"""Default of ``--within``: a daemon restarts in seconds, and the firmware of a large server needs ten minutes."""


@click.command(cls=options.accepting({"--plan": "--dry-run"}))
@click.option(
    "--package",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Debian package to install over SSH on each node.",
)
@click.option("--ssh-user", default="root", show_default=True, metavar="USER", help="SSH user for --package.")
@click.option(
    "--command",
    default="",
    metavar="COMMAND",
    help="Upgrade each node by running this command here. It gets SKEP_NODE and SKEP_ADDRESS.",
)
@click.option(
    "--rollback-command", "rollback", default="", metavar="COMMAND", help="Command that undoes --command."
)
@click.option(
    "--to",
    "version",
    default="",
    metavar="VERSION",
    help="Version that nodes report after --command.",
)
@click.option(
    "--system", is_flag=True, help="Reboot the nodes whose machine needs it, instead of upgrading Skep."
)
@click.option("--packages", is_flag=True, help="With --system: also install packages, with apt or dnf.")
@click.option("--keep-running", is_flag=True, help="Keep containers running instead of draining each node.")
@click.option(
    "--within",
    type=options.Duration(),
    metavar="DURATION",
    help="Longest time for a node to become healthy. Default: 3m, with --system 15m.",
)
@options.dry_run("Show the steps without taking them. Exit code 2: blocked.")
@click.option("--continue", "continues", is_flag=True, help="Resume an interrupted upgrade.")
@click.option(
    "--abort",
    "aborts",
    is_flag=True,
    help="Abort an interrupted upgrade and activate its node.",
)
@options.override_freeze
@click.pass_obj
def upgrade(
    host: HostOptions,
    /,
    *,
    keep_running: bool,
    within: float | None,
    dry_run: bool,
    continues: bool,
    aborts: bool,
    override_freeze: bool,
    system: bool,
    **chosen: Any,
) -> None:
    """Upgrade all nodes one after the other.

    Drains each node, upgrades it, waits until it is healthy, and activates it. Workers come first, then managers, the
    leader last.

    If a node is not healthy in time, its previous version is installed again and the upgrade stops. The upgrade does
    not start while a manager is unreachable or a service other than a job is degraded.

    With --system, nodes that need a reboot are rebooted over SSH, or by --command, which also gets SKEP_BOOT.

    \b
    Examples:
      skep upgrade --dry-run --package skep_0.2.0_amd64.deb
      skep upgrade --package skep_0.2.0_amd64.deb
      skep upgrade --to 0.2.0 --command 'ssh root@$SKEP_ADDRESS skep-install 0.2.0'
      skep upgrade --system --packages
      skep upgrade --abort
    """
    with errors_shown():
        if aborts:
            if dry_run or continues:
                raise InvalidArgument(
                    "--abort cannot be combined with --dry-run and --continue. Run skep reboot-lock status to see the "
                    "upgrade that it would end."
                )
            asyncio.run(abort(host))
            return
        means = _system_means(keep_running, **chosen) if system else _means(**chosen)
        if dry_run:
            raise SystemExit(asyncio.run(show_plan(host, means, drains=not keep_running)))
        asyncio.run(
            carry_out(
                host,
                means,
                drains=not keep_running,
                within_s=within or (_SYSTEM_WITHIN_S if system else _WITHIN_S),
                continues=continues,
                is_override=override_freeze,
            )
        )


def _means(
    package: Path | None, command: str, rollback: str, version: str, ssh_user: str, packages: bool
) -> Means:
    """Return the means of upgrading Skep.  Raises: InvalidArgument."""
    if packages:
        raise InvalidArgument("--packages needs --system.")
    return Means(
        version=_version(package, command, version),
        package=package,
        ssh_user=ssh_user,
        command=command,
        rollback=rollback,
    )


def _system_means(
    keep_running: bool,
    package: Path | None,
    command: str,
    rollback: str,
    version: str,
    ssh_user: str,
    packages: bool,
) -> SystemMeans:
    """Return the means of upgrading machines.  Raises: InvalidArgument."""
    if package is not None or rollback or version or keep_running:
        raise InvalidArgument(
            "--system cannot be combined with --package, --rollback-command, --to and --keep-running. Run skep upgrade "
            "without --system to upgrade Skep."
        )
    if packages and command:
        raise InvalidArgument("--packages needs SSH. Leave out --command, or install packages by it.")
    return SystemMeans(ssh_user=ssh_user, command=command, installs=packages, here=_own_boot_id())


def _own_boot_id() -> str:
    """Return this machine's boot id, or an empty text on a machine without Linux, which cannot be a node."""
    try:
        return boot_id()
    except OSError:
        return ""


def _version(package: Path | None, command: str, version: str) -> str:
    """Return the version that nodes report afterwards.  Raises: InvalidArgument."""
    if (package is None) == (not command):
        raise InvalidArgument("Specify --package or --command, or --system to reboot machines.")
    if package is None:
        if not version:
            raise InvalidArgument("--command needs --to VERSION.")
        return version
    done = subprocess.run(
        ["dpkg-deb", "-f", package, "Version"], capture_output=True, text=True, timeout=30, check=False
    )
    if done.returncode:
        raise InvalidArgument(
            f"{package} is not a Debian package: {done.stderr.strip()}. Choose the package of the new version."
        )
    return version or version_of(done.stdout.strip())


def version_of(debian: str) -> str:
    """Return the version that a node with this Debian version of the package reports (``setup/package.sh``)."""
    return debian.replace("~", "")
