"""The means of upgrading one node: a Debian package over ssh, or commands of the operator."""

import asyncio
import os
import re
import subprocess
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import msgspec

from skep.cli.maintain.upgrade_plan import UpgradableNode, UpgradeStep
from skep.cli.start.up import APT_INSTALL, INSTALLS_WITHIN_S, TargetMachine, quoted
from skep.errors import Unavailable

CHECKED_WITHIN_S = 30.0
"""Seconds to log in by SSH and run one short script, which may wait for a name server."""
_HOST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
FORMER = "/var/cache/skep/former.deb"

_WORK = """set -e
umask 022
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"""
_KEEP = f"""mkdir -p "$work/root/DEBIAN" "$(dirname {FORMER})"
dpkg-query -L skep | grep -v '^/etc/' | while read -r path; do
    if [ -h "$path" ] || [ -f "$path" ]; then
        mkdir -p "$work/root$(dirname "$path")"
        cp -a "$path" "$work/root$path"
    fi
done
dpkg-query -s skep | awk '/^[^ ]/ {{ kept = !/^(Status|Conffiles):/ }} kept' >"$work/root/DEBIAN/control"
for script in postinst prerm postrm; do
    cp "/var/lib/dpkg/info/skep.$script" "$work/root/DEBIAN/$script"
done
dpkg-deb --root-owner-group -Zgzip -z1 --build "$work/root" "$work/former.deb" >&2
mv "$work/former.deb" {FORMER}
"""
KEEP_FORMER = _WORK + _KEEP
"""Packs the installed version, because its package file has usually been removed.

Settings are left out, and dpkg keeps them.  Otherwise the operator's changes would become the package's own settings,
which the next version replaces.
"""
_INSTALL = f"""if ! {APT_INSTALL} "$package" >"$work/log" 2>&1 </dev/null; then
    tail -n 5 "$work/log" >&2
    exit 1
fi
"""
"""Writes its output to a file, so that a lost ssh connection cannot end the installation at its next write."""
REPLACE = f"""{_WORK}
package=$work/new.deb
cat >"$package"
chmod 755 "$work"
case "$(dpkg-query -W -f '${{db:Status-Status}} ${{Version}}' skep)" in
"installed $(dpkg-deb -f "$package" Version)") ;;
installed\\ *)
{_KEEP};;
esac
{_INSTALL}"""
"""It does not pack a version that an interrupted upgrade has installed, because a rollback would then install the new
version.
"""
_GO_BACK = f"{_WORK}package={FORMER}\n{_INSTALL}"
_CHECK = """[ "$(id -u)" = 0 ] || { echo "this user is not root" >&2; exit 1; }
dpkg-query -s skep >/dev/null 2>&1 || { echo "skep is not installed as a Debian package" >&2; exit 1; }
"""


class UpgradeAction(msgspec.Struct, frozen=True):
    """A part of a node's upgrade, and the text about it."""

    words: str
    run: Callable[[], Awaitable[None]]


class UpgradeWords(msgspec.Struct, frozen=True, kw_only=True):
    """Texts about an upgrade."""

    failed: str
    """Predicate of a node that did not come back."""
    done: str
    """Participle of a node that was upgraded."""
    resume: str
    """It says how to continue after a failure."""


class Means(msgspec.Struct, frozen=True, kw_only=True):
    """The means of upgrading a node: a package over ssh, or the operator's commands, run on this machine."""

    version: str
    package: Path | None = None
    ssh_user: str = "root"
    command: str = ""
    rollback: str = ""

    is_system: ClassVar[bool] = False
    """Whether the machines are upgraded and rebooted (``upgrade_system``) instead of Skep."""

    def is_due(self, node: UpgradableNode) -> bool:
        """Return whether the node needs the upgrade."""
        return node.version != self.version

    def is_healthy(self, node: UpgradableNode) -> bool:
        """Return whether a node that is not due is healthy."""
        return node.is_ready and node.version == self.version

    def is_done(self, before: UpgradableNode, now: UpgradableNode) -> bool:
        """Return whether the node is back after its upgrade.  ``before``: the node before the upgrade."""
        return self.is_healthy(now)

    def actions(self, node: UpgradableNode) -> Sequence[UpgradeAction]:
        """Return the parts of the node's upgrade in their order."""
        return (
            UpgradeAction(f"upgrading from {node.version} to {self.version}", partial(self.upgrade, node)),
        )

    @property
    def words(self) -> UpgradeWords:
        """Return the texts about this upgrade."""
        return UpgradeWords(
            failed=f"did not become healthy with {self.version}",
            done=f"upgraded to {self.version}",
            resume="rerun with --continue",
        )

    def step_words(self, step: UpgradeStep) -> str:
        """Return a text about a planned step."""
        how = "drain, upgrade, activate" if step.drains else "upgrade while containers keep running"
        return f"{how}, from {step.node.version or 'unknown'} to {self.version}"

    async def check(self, node: UpgradableNode) -> bool:
        """Check that the node can be upgraded, before it is drained, and return whether it needs that.

        Raises: Unavailable: it cannot be upgraded.
        """
        if self.package is not None:
            await self.machine(node).run(["sh", "-c", quoted(_CHECK)], b"", timeout_s=CHECKED_WITHIN_S)
        return True

    async def upgrade(self, node: UpgradableNode) -> None:
        """Upgrade the node.  Raises: Unavailable: the upgrade failed."""
        if self.package is None:
            await run_here(self.command, node)
            return
        content = await asyncio.to_thread(self.package.read_bytes)
        await self.machine(node).run(["sh", "-c", quoted(REPLACE)], content, timeout_s=INSTALLS_WITHIN_S)

    async def roll_back(self, node: UpgradableNode) -> None:
        """Install the former version again.  Raises: Unavailable."""
        if self.package is None:
            await run_here(self.rollback, node)
            return
        await self.machine(node).run(["sh", "-c", quoted(_GO_BACK)], b"", timeout_s=INSTALLS_WITHIN_S)

    @property
    def can_roll_back(self) -> bool:
        """Return whether a node can be rolled back."""
        return self.package is not None or bool(self.rollback)

    def machine(self, node: UpgradableNode) -> TargetMachine:
        """Return the node's machine for ssh."""
        address = f"[{node.address}]" if ":" in node.address else node.address
        return TargetMachine.of(f"ssh://{self.ssh_user}@{address}")


async def run_here(command: str, node: UpgradableNode) -> None:
    """Run a command of the operator on this machine.  Raises: Unavailable: it failed."""
    # The node chooses its host name, and a name like "-oProxyCommand=..." would be an option of ssh on this machine.
    name = node.name if _HOST_NAME.fullmatch(node.name) else node.id
    environment = {**os.environ, "SKEP_NODE": name, "SKEP_ADDRESS": node.address, "SKEP_BOOT": node.boot}
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", command), stdin=subprocess.DEVNULL, stdout=2, env=environment
    )
    try:
        async with asyncio.timeout(INSTALLS_WITHIN_S):
            code = await process.wait()
    except TimeoutError:
        raise Unavailable(f"the command did not finish within {INSTALLS_WITHIN_S:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if code:
        raise Unavailable(f"the command ended with code {code}")
