"""File servers on this machine's loopback, from the distribution's packages: the kernel's NFS server and Samba."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from skep.linux.syscalls import mount, unmount

SMB_PORT = 4455
PASSWORD = "correct-horse"
_NFSD = Path("/proc/fs/nfsd")


class Share(NamedTuple):
    """A directory that a server shares: a volume's options for it, and the type that mount(8) shows."""

    directory: Path
    options: Mapping[str, str]
    shown: str

    def with_option(self, old: str, new: str) -> dict[str, str]:
        """Return the volume's options with another word in ``o``."""
        assert old in self.options["o"]
        return {**self.options, "o": self.options["o"].replace(old, new)}


def nfs_threads(count: int) -> None:
    """Set the number of threads that serve clients.  With 0 the server is away, and connections are refused."""
    words = ["rpc.nfsd", "--grace-time", "10", "--lease-time", "10"] if count else ["rpc.nfsd"]
    subprocess.run([*words, str(count)], check=True, timeout=60)


@contextmanager
def nfs_server(directory: Path) -> Iterator[Mapping[str, Share]]:
    """Share ``directory`` by NFS versions 3 and 4."""
    directory.mkdir()
    exported = "rw,no_root_squash,no_subtree_check,insecure,fsid=0"
    with ExitStack() as stack:
        Path("/run/rpcbind").mkdir(exist_ok=True)
        stack.enter_context(_running("rpcbind", "-f"))
        _wait(lambda: _calls("rpcinfo", "-p", "127.0.0.1"), "rpcbind responds")
        subprocess.run(["modprobe", "nfsd"], check=True)
        mount("nfsd", _NFSD, "nfsd")
        stack.callback(unmount, _NFSD)
        subprocess.run(["exportfs", "-o", exported, f"127.0.0.1:{directory}"], check=True)
        stack.callback(subprocess.run, ["exportfs", "-au"], check=True)
        stack.enter_context(_running("rpc.mountd", "--foreground"))
        nfs_threads(4)
        stack.callback(nfs_threads, 0)
        # NFS, and the program that returns the first handle of version 3.
        for program in ("100003", "100005"):
            ask = ("rpcinfo", "-t", "127.0.0.1", program, "3")
            _wait(lambda ask=ask: _calls(*ask), f"program {program} responds")  # type: ignore[misc]
        # The options are as in Docker's documents, except for the locks of version 3, which would need one more daemon.
        third = {"type": "nfs", "o": "addr=127.0.0.1,rw,nolock", "device": f":{directory}"}
        fourth = {"type": "nfs", "o": "addr=localhost,rw,nfsvers=4,timeo=20,retrans=1", "device": ":/"}
        yield {"nfs 3": Share(directory, third, "nfs"), "nfs 4": Share(directory, fourth, "nfs4")}


@contextmanager
def samba(directory: Path, state: Path) -> Iterator[Share]:
    """Share ``directory`` as ``files``, for the user ``root`` with a password."""
    directory.mkdir()
    state.mkdir()
    kept = ("private dir", "lock directory", "state directory", "cache directory", "pid directory")
    settings = state / "smb.conf"
    settings.write_text(
        "[global]\nserver role = standalone server\nmap to guest = never\ndisable netbios = yes\n"
        "bind interfaces only = yes\ninterfaces = 127.0.0.1\nload printers = no\ndisable spoolss = yes\n"
        f"smb ports = {SMB_PORT}\npassdb backend = tdbsam:{state}/passdb.tdb\nncalrpc dir = {state}/ncalrpc\n"
        f"log file = {state}/log\n"
        + "".join(f"{one} = {state}\n" for one in kept)
        + f"[files]\npath = {directory}\nread only = no\n"
    )
    add = ["smbpasswd", "-c", str(settings), "-L", "-a", "-s", "root"]
    subprocess.run(add, input=f"{PASSWORD}\n" * 2, text=True, check=True, timeout=60)
    with _running("smbd", "--foreground", "--no-process-group", "--configfile", str(settings)):
        login = ("smbclient", "-s", str(settings), "-p", str(SMB_PORT), "-U", f"root%{PASSWORD}")
        _wait(lambda: _calls(*login, "//127.0.0.1/files", "-c", "ls"), "Samba responds")
        given = f"addr=127.0.0.1,port={SMB_PORT},username=root,password={PASSWORD},vers=3.0"
        options = {"type": "cifs", "o": given, "device": "//127.0.0.1/files"}
        yield Share(directory, options, "cifs")


@contextmanager
def _running(*command: str) -> Iterator[None]:
    # In its own process group, because smbd ends the whole group that it was started in.
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            yield
        finally:
            process.terminate()


def _calls(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, timeout=60).returncode == 0


def _wait(condition: Callable[[], bool], what: str, within_s: float = 120) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        time.sleep(0.2)


@contextmanager
def silent_directory(path: Path) -> Iterator[Path]:
    """A file system whose server never responds: whoever looks into it waits."""
    path.mkdir()
    server = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        mount("silent", path, "fuse", 0, f"fd={server},rootmode=40000,user_id=0,group_id=0")
        try:
            yield path
        finally:
            unmount(path)
    finally:
        os.close(server)
