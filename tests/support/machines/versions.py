"""Two versions of Skep side by side: the version of each playground node, and how it changes.

``python -m tests.support.machines.versions DIRECTORY NAME FOLDER NODE VERSION`` changes a node of the playground NAME.
"""

import io
import os
import subprocess
import sys
import tarfile
from compileall import compile_dir
from contextlib import suppress
from pathlib import Path

from docker.errors import DockerException
from requests.exceptions import RequestException

from tests.support.machines.playground_rig import TestCluster, TestNode, wait_until

ROOT = Path(__file__).resolve().parents[3]


def package_of(commit: str, folder: Path) -> Path:
    """Write the package as of ``commit`` to ``folder``, and return ``folder``."""
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", commit, "skep"], capture_output=True, check=False
    )
    assert archive.returncode == 0, (
        f"commit {commit} is not in this clone: fetch the whole history (git fetch --unshallow), or name "
        f"another commit in SKEP_EARLIER\n{archive.stderr.decode()}"
    )
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 and later
        files.extractall(folder)
    compile_dir(folder, quiet=2)  # or all nodes of a playground would do so at their start, at the same time
    return folder


class Versions:
    """The version of each playground node.  A launcher reads it from a file and starts the daemon.

    Each version has its own environment: this one's libraries, another package.
    """

    def __init__(self, folder: Path, earlier: Path) -> None:
        self._folder = folder
        self._environments = {
            is_present: environment(folder / name, package)
            for is_present, name, package in ((True, "present", ROOT), (False, "earlier", earlier))
        }
        playground = environment(folder / "playground", ROOT)
        self.command = playground / "bin/skep-playground"
        (playground / "bin/skep").rename(self.command)
        launcher = playground / "bin/skep"
        node = f"{folder}/$(cat /proc/sys/kernel/hostname)"
        launcher.write_text(
            f'#!/bin/sh\nexec "$(cat "{node}" 2>/dev/null || cat "{folder}/all")/bin/skep" "$@"\n'
        )
        launcher.chmod(0o755)
        self._write("all", is_present=False)

    def set(self, name: str, *, is_present: bool) -> None:
        """Set the version that ``name`` runs from its next start."""
        self._write(name, is_present=is_present)

    def check(self, node: TestNode, *, is_present: bool) -> None:
        """Check that the node's processes have this version."""
        wanted = str(self._environments[is_present])
        found = {
            comm: Path(f"/proc/{pid}/cmdline").read_text().partition("\0")[0]
            for pid, comm in node.processes()
            if comm in ("skep-node", "skep-manager")
        }
        assert found
        assert all(command.startswith(wanted) for command in found.values()), f"{wanted}: {found}"

    def _write(self, name: str, *, is_present: bool) -> None:
        (self._folder / name).write_text(str(self._environments[is_present]))


def environment(folder: Path, package: Path) -> Path:
    """Create a virtual environment with the libraries of this one and the package below ``package``."""
    real = Path(sys.prefix)
    library = next((real / "lib").glob("python3*")).name
    packages = folder / "lib" / library / "site-packages"
    packages.mkdir(parents=True)
    # These lines are written here, because path files like this one are not read in folders that such a line adds.
    (packages / "packages.pth").write_text(f"{package}\n{real}/lib/{library}/site-packages\n")
    (folder / "bin").mkdir()
    (folder / "bin/python").symlink_to((real / "bin/python").resolve())
    (folder / "libexec").symlink_to(real / "libexec")
    (folder / "pyvenv.cfg").write_text((real / "pyvenv.cfg").read_text())
    command = folder / "bin/skep"
    command.write_text(f"#!{folder}/bin/python\nfrom skep.cli.main import main\n\nmain()\n")
    command.chmod(0o755)
    return folder


def restart(cluster: TestCluster, name: str) -> None:
    """End the node's processes, but not its containers, as an upgrade of the package does.  They are restarted."""
    node = cluster.node(name)
    ends = cluster.directory / name / "ends"
    before = len(ends.read_text().splitlines()) if ends.exists() else 0
    daemon = node.pids("skep-node")[0]
    os.kill(daemon, 15)
    wait_until(lambda: ends.exists() and len(ends.read_text().splitlines()) > before, f"{name} has ended", 60)
    wait_until(lambda: answers(node), f"{name} answers", 60)


def answers(node: TestNode) -> bool:
    with suppress(DockerException, RequestException):
        return bool(node.client().info()["Swarm"]["LocalNodeState"] == "active")
    return False


def main(directory: str, name: str, folder: str, node: str, version: str) -> None:
    """Change the version of a node."""
    (Path(folder) / node).write_text(str(Path(folder) / version))
    restart(TestCluster(Path(directory), name), node)


if __name__ == "__main__":
    main(*sys.argv[1:])
