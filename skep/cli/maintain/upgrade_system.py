"""The means of ``skep upgrade --system``: reboots machines over ssh, or by a command of the operator.

A machine is due while its node reports the condition ``reboot-required``.  With packages, every machine is looked at,
and is due if its package manager has something to install.  So an interrupted run needs no list of machines.

Every script gets the boot id that the node has reported, and does nothing on a machine with another one.  So a command
that was suspended while another one rebooted the machine does not reboot it again, and an address that leads to another
machine is noticed.
"""

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import msgspec

from skep.cli.maintain.upgrade_means import CHECKED_WITHIN_S, Means, UpgradeAction, UpgradeWords, run_here
from skep.cli.maintain.upgrade_plan import UpgradableNode, UpgradeStep
from skep.cli.start.up import quoted
from skep.errors import Unavailable
from skep.model.values.counts import counted

_LOOKED_WITHIN_S = 180.0
"""Seconds to fetch the lists of packages, for which a mirror may be slow."""
_INSTALLED_WITHIN_S = 1200.0
"""Seconds to download and install packages.  It is shorter than the lease of the lock."""
_APT = (
    "DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=120 -o Dpkg::Options::=--force-confdef "
    '-o Dpkg::Options::=--force-confold -o Dir::Etc::Preferences="$work/preferences" upgrade --with-new-pkgs'
)
_DNF = "dnf -y --exclude=skep upgrade"
SHOWN = {"apt": "apt-get upgrade --with-new-pkgs", "dnf": "dnf upgrade"}
"""Command of each package manager as it is shown.  Skep's own package is left out, because ``skep upgrade --package``
can roll it back.
"""
_SAME_BOOT = """[ "$(id -u)" = 0 ] || { echo "this user is not root" >&2; exit 1; }
[ "$(cat /proc/sys/kernel/random/boot_id)" = "$boot" ] || {
    echo "this machine has another boot id than the node: it was rebooted meanwhile, or the address is wrong" >&2
    exit 1
}
"""
_PACKAGES = """set -e
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed() {
    tail -n 5 "$work/log" >&2
    exit 1
}
if command -v apt-get >/dev/null; then
    manager=apt
    { cat /etc/apt/preferences 2>/dev/null || true; printf '\\nPackage: skep\\nPin: version *\\nPin-Priority: -1\\n'
    } >"$work/preferences"
elif command -v dnf >/dev/null; then
    manager=dnf
else
    echo "neither apt nor dnf is on this machine" >&2
    exit 1
fi
"""
LOOK = f"""{_SAME_BOOT}{_PACKAGES}
if [ $manager = apt ]; then
    apt-get -q -o DPkg::Lock::Timeout=120 update >"$work/log" 2>&1 </dev/null || failed
    {_APT} --simulate >"$work/found" 2>"$work/log" </dev/null || failed
    count=$(grep -c '^Inst ' "$work/found" || true)
else
    code=0
    dnf -q --exclude=skep check-update >"$work/found" 2>"$work/log" </dev/null || code=$?
    case $code in 0 | 100) ;; *) failed ;; esac
    count=$(awk '/^Obsoleting/ {{ exit }} NF == 3 {{ count++ }} END {{ print count + 0 }}' "$work/found")
fi
echo $manager $count
"""
"""Prints the package manager and the number of packages that it would install."""
INSTALL = f"""{_SAME_BOOT}{_PACKAGES}
case $manager in
apt) {_APT} ;;
dnf) {_DNF} ;;
esac >"$work/log" 2>&1 </dev/null || failed
"""
"""Writes its output to a file, so that a lost ssh connection cannot end the installation at its next write."""
REBOOT = f"""{_SAME_BOOT}
setsid sh -c 'sleep 2; systemctl reboot || reboot' >/dev/null 2>&1 </dev/null &
"""
"""The reboot begins after the end of this script, so that ssh reports success."""


class SystemMeans(Means, frozen=True, kw_only=True):
    """Reboots machines, after an installation of packages if ``installs``.

    Args:
        here: boot id of the machine on which the command runs, which cannot reboot itself.
        pending: packages to install and their package manager, by node.  ``check`` finds them.
    """

    is_system: ClassVar[bool] = True

    version: str = ""
    installs: bool = False
    here: str = ""
    pending: dict[str, tuple[str, int]] = msgspec.field(default_factory=dict)

    def is_due(self, node: UpgradableNode) -> bool:
        """See ``Means``."""
        return self.installs or bool(node.reboot)

    def is_healthy(self, node: UpgradableNode) -> bool:
        """See ``Means``."""
        return node.is_ready

    def is_done(self, before: UpgradableNode, now: UpgradableNode) -> bool:
        """See ``Means``.  The last boot id of a node that is down is that before the reboot."""
        return now.is_ready and now.boot not in ("", before.boot)

    def actions(self, node: UpgradableNode) -> Sequence[UpgradeAction]:
        """See ``Means``."""
        manager, count = self.pending.get(node.id, ("", 0))
        reboot = UpgradeAction("rebooting", partial(self.upgrade, node))
        if not count:
            return (reboot,)
        words = f"installing {counted(count, 'package')} with {SHOWN[manager]}"
        return (UpgradeAction(words, partial(self._install, node)), reboot)

    @property
    def words(self) -> UpgradeWords:
        """See ``Means``."""
        again = "skep upgrade --system --packages" if self.installs else "skep upgrade --system"
        return UpgradeWords(
            failed="did not return healthy from its reboot", done="rebooted", resume=f"run {again} --continue"
        )

    def step_words(self, step: UpgradeStep) -> str:
        """See ``Means``."""
        if self.installs:
            reason = f": {step.node.reboot}" if step.node.reboot else ", if packages are to be installed"
            return f"drain, install packages, reboot, activate{reason}"
        return f"drain, reboot, activate: {step.node.reboot}"

    async def check(self, node: UpgradableNode) -> bool:
        """See ``Means``."""
        if not node.boot:
            raise Unavailable("it does not report its boot id. Run skep upgrade --package first")
        if self.command:
            return True
        if node.boot == self.here:
            raise Unavailable(
                "this command runs on it, and would end with the reboot. Run it on another machine"
            )
        if not self.installs:
            await self._run(node, _SAME_BOOT, CHECKED_WITHIN_S)
            return True
        manager, _, count = (await self._run(node, LOOK, _LOOKED_WITHIN_S)).strip().rpartition(" ")
        if manager not in SHOWN or not count.isdigit():
            raise Unavailable(
                "its package manager has an unknown output. Run skep upgrade --system without --packages"
            )
        self.pending[node.id] = (manager, int(count))
        return bool(int(count) or node.reboot)

    async def upgrade(self, node: UpgradableNode) -> None:
        """Begin the node's reboot.  Raises: Unavailable."""
        if self.command:
            await run_here(self.command, node)
            return
        await self._run(node, REBOOT, CHECKED_WITHIN_S)

    async def _install(self, node: UpgradableNode) -> None:
        await self._run(node, INSTALL, _INSTALLED_WITHIN_S)

    async def _run(self, node: UpgradableNode, script: str, within_s: float) -> str:
        given = f"boot={quoted(node.boot)}\n{script}"
        return await self.machine(node).run(["sh", "-c", quoted(given)], b"", timeout_s=within_s)
