"""GlusterFS on the nodes of a playground, with the distribution's servers, which are only unpacked.

Each node has a mount namespace of its own.  There the unpacked files are part of /usr, as if they were installed.
"""

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tests.support.machines.playground_rig import TestNode, wait_until

PACKAGES = ("glusterfs-server", "glusterfs-client", "glusterfs-common", "glusterfs-cli")
VOLUME = "shared"
MOUNTED = "/srv/shared"
"""Mount point of the volume on each node."""
_WITHIN_S = 60.0
"""Seconds until a server responds, or the volume is mounted, on a busy machine."""
_SERVER = f"""\
mount -t overlay overlay -o lowerdir=$0/usr:/usr /usr
mount --bind $1/log /var/log
mount -t tmpfs tmpfs /srv
mkdir -p {MOUNTED} /run/gluster /var/log/glusterfs
exec glusterd --no-daemon --volfile=$0/etc/glusterfs/glusterd.vol \
    --xlator-option management.working-directory=$1/state
"""


class GlusterNode:
    """The servers of one node, its brick, and its mount of the volume."""

    def __init__(self, node: TestNode, directory: Path, unpacked: Path) -> None:
        """``directory`` is the node's disk, and ``unpacked`` the root of the packages."""
        self.node = node
        self.brick = directory / "brick"
        self.said = ""
        """Output of the last command."""
        self._directory, self._unpacked = directory, unpacked
        for name in ("state", "log", "brick"):
            (directory / name).mkdir(parents=True)

    @property
    def address(self) -> str:
        return str(self.node.description["addr"])

    @property
    def mounted(self) -> Path:
        """The volume as this node sees it."""
        return Path(f"/proc/{self._pid}/root{MOUNTED}")

    @property
    def _pid(self) -> int:
        return int(self.node.description["pids"][0])

    def start(self) -> None:
        """Install and start the server, as after a boot.  It starts the brick and the healing daemon if it has them."""
        with (self._directory / "log" / "started").open("ab") as log:
            words = ["sh", "-ec", _SERVER, str(self._unpacked), str(self._directory)]
            subprocess.Popen([*self._enter(), *words], stdout=log, stderr=log)
        wait_until(
            lambda: self.gluster("peer", "status"), f"the server of {self.node.name} responds", _WITHIN_S
        )

    def gluster(self, *words: str) -> bool:
        """Run GlusterFS' command, and return whether it succeeded."""
        command = [*self._enter(), "gluster", "--mode=script", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        self.said = f"{done.stdout}{done.stderr}"
        return done.returncode == 0

    def mount(self, servers: Sequence[str]) -> None:
        """Mount the volume, as the machine does at its start."""
        named = [f"--volfile-server={one}" for one in servers]
        log = f"--log-file={self._directory}/log/mount.log"
        command = [*self._enter(), "glusterfs", *named, f"--volfile-id={VOLUME}", log, MOUNTED]
        subprocess.run(command, check=True, timeout=60, capture_output=True)
        wait_until(
            lambda: f" {MOUNTED} fuse.glusterfs " in Path(f"/proc/{self._pid}/mounts").read_text(),
            f"{self.node.name} has mounted the volume",
            _WITHIN_S,
        )

    def unmount(self) -> None:
        subprocess.run([*self._enter(), "umount", MOUNTED], check=True, timeout=60, capture_output=True)

    def power_off(self) -> None:
        """Kill everything of GlusterFS on this node."""
        for pid, name in list(self.node.processes()):
            if name.startswith("gluster"):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _enter(self) -> list[str]:
        return ["nsenter", "-t", str(self._pid), "--mount", "--net", "--"]
