"""The means of upgrading one node: a Debian package over ssh, or commands of the operator."""

import asyncio
import os
import re
import subprocess
from pathlib import Path

import msgspec

from skep.cli.maintain.upgrade_plan import (
    UpgradableNode,
)
from skep.cli.start.up import APT_INSTALL, INSTALLS_WITHIN_S, TargetMachine, quoted
from skep.errors import Unavailable

_CHECKED_WITHIN_S = 30.0
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


class Means(msgspec.Struct, frozen=True, kw_only=True):
    """The means of upgrading a node: a package over ssh, or the operator's commands, run on this machine."""

    version: str
    package: Path | None = None
    ssh_user: str = "root"
    command: str = ""
    rollback: str = ""

    async def check(self, node: UpgradableNode) -> None:
        """Check that the node can be upgraded, before it is drained.  Raises: Unavailable."""
        if self.package is not None:
            await self._machine(node).run(["sh", "-c", quoted(_CHECK)], b"", timeout_s=_CHECKED_WITHIN_S)

    async def upgrade(self, node: UpgradableNode) -> None:
        """Upgrade the node.  Raises: Unavailable: the upgrade failed."""
        if self.package is None:
            await _run_here(self.command, node)
            return
        content = await asyncio.to_thread(self.package.read_bytes)
        await self._machine(node).run(["sh", "-c", quoted(REPLACE)], content, timeout_s=INSTALLS_WITHIN_S)

    async def roll_back(self, node: UpgradableNode) -> None:
        """Install the former version again.  Raises: Unavailable."""
        if self.package is None:
            await _run_here(self.rollback, node)
            return
        await self._machine(node).run(["sh", "-c", quoted(_GO_BACK)], b"", timeout_s=INSTALLS_WITHIN_S)

    @property
    def can_roll_back(self) -> bool:
        """Return whether a node can be rolled back."""
        return self.package is not None or bool(self.rollback)

    def _machine(self, node: UpgradableNode) -> TargetMachine:
        address = f"[{node.address}]" if ":" in node.address else node.address
        return TargetMachine.of(f"ssh://{self.ssh_user}@{address}")


async def _run_here(command: str, node: UpgradableNode) -> None:
    # The node chooses its host name, and a name like "-oProxyCommand=..." would be an option of ssh on this machine.
    name = node.name if _HOST_NAME.fullmatch(node.name) else node.id
    environment = {**os.environ, "SKEP_NODE": name, "SKEP_ADDRESS": node.address}
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
