"""Confines the workers that read archives and trees.  They drop their rights before they read the first byte.

A worker keeps the capabilities to set owners, modes, devices and file capabilities, in its own root directory and in
namespaces without network, foreign mounts or queues.  A filter refuses system calls that expose more of the kernel, or
another process.  They fail with EPERM.  Rights that the machine does not allow to drop are kept: the chroot confines
the worker, and the rest protects against an exploited archive parser.

Only overlayfs's attribute ``opaque`` needs more rights.  A helper process sets and reads it, and receives only
descriptors of directories.
"""

import array  # noqa: F401  # socket.send_fds imports it when it is called, and then it is too late
import ctypes
import os
import signal
import socket
import struct
from typing import Final

from skep.linux.own_user_namespace import overlay_prefix

_CAPABILITIES: Final = {"CHOWN": 0, "DAC_OVERRIDE": 1, "FOWNER": 3, "FSETID": 4, "MKNOD": 27, "SETFCAP": 31}
# Source: linux/capability.h, linux/prctl.h and linux/seccomp.h.
_CAPABILITY_VERSION_3 = 0x20080522
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
_SECCOMP_MODE_FILTER = 2
_NEW_NAMESPACES: Final = 0x00020000 | 0x08000000 | 0x40000000
"""CLONE_NEWNS, CLONE_NEWIPC and CLONE_NEWNET."""

_DESCRIPTORS_MAX = 256
"""Number of descriptors that are closed in the worker.  More than the process has open when it forks."""
_PREFIX = overlay_prefix().encode()
_OPAQUE = _PREFIX + b"opaque"
_ELSEWHERE = (_PREFIX + b"redirect", _PREFIX + b"metacopy")
_SET, _GET = b"x", b"?"

# Source: linux/seccomp.h: SECCOMP_RET_ALLOW, _ERRNO with EPERM, and _KILL_PROCESS.
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | 1, 0x80000000
_AUDIT_ARCH: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Source: asm/unistd.h: __X32_SYSCALL_BIT.
_X32_BIT = 0x40000000
_REFUSED: Final = {
    # Refused calls, in order:
    # socket, socketpair, connect, accept, bind, clone, fork, vfork, execve, ptrace, personality, pivot_root, chroot,
    # mount, umount2, reboot, init_module, delete_module, kexec_load, add_key, request_key, keyctl, unshare, setns,
    # perf_event_open, name_to_handle_at, open_by_handle_at, process_vm_readv, process_vm_writev, kcmp, finit_module,
    # bpf, execveat, userfaultfd, io_uring_setup, io_uring_enter, io_uring_register, pidfd_open, pidfd_getfd, clone3,
    # kill, tkill, tgkill
    "x86_64": (
        *(
            41,
            53,
            42,
            43,
            49,
            56,
            57,
            58,
            59,
            101,
            135,
            155,
            161,
            165,
            166,
            169,
            175,
            176,
            246,
            248,
            249,
            250,
        ),
        *(
            272,
            308,
            298,
            303,
            304,
            310,
            311,
            312,
            313,
            321,
            322,
            323,
            425,
            426,
            427,
            434,
            438,
            435,
            62,
            200,
            234,
        ),
    ),
    "aarch64": (
        *(198, 199, 203, 202, 200, 220, 221, 117, 92, 41, 51, 40, 39, 142, 105, 106, 104, 217, 218, 219),
        *(
            97,
            268,
            241,
            264,
            265,
            270,
            271,
            272,
            273,
            280,
            281,
            282,
            425,
            426,
            427,
            434,
            438,
            435,
            129,
            130,
            131,
        ),
    ),
}
"""Numbers of system calls that writing files does not need, by machine."""
_MOUNT_CALLS: Final = (428, 429, 430, 431, 432, 433, 442)
"""Numbers of the system calls from open_tree to fspick, and of mount_setattr.  They are the same on every machine."""

_libc = ctypes.CDLL(None, use_errno=True)


def confine(root: str) -> "Helper":
    """Enter ``root`` permanently, drop all rights that writing files does not need, and return the helper for the rest.

    Raises: OSError: the directory does not exist, or this process lacks the rights.
    """
    _libc.unshare(_NEW_NAMESPACES)
    os.chroot(root)
    os.chdir("/")
    helper = Helper()
    _drop_capabilities()
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _install(_filter(os.uname().machine))
    return helper


class Helper:
    """Process in the same root that marks directories as opaque, and ends with the worker."""

    PLAIN: Final = 0
    OPAQUE: Final = 1
    """The directory hides its contents in lower layers."""
    MOVED: Final = 2
    """The directory's contents are at another path of a lower layer."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        worker = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                # Close the pipe of the worker's response here, so that it closes when the worker ends.
                os.closerange(0, theirs.fileno())
                os.closerange(theirs.fileno() + 1, _DESCRIPTORS_MAX)
                _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() == worker:
                    _mark(theirs)
            finally:
                os._exit(0)
        theirs.close()

    def close(self) -> None:
        """End the helper."""
        self._socket.close()
        os.waitpid(self._pid, 0)

    def mark_opaque(self, directory: str) -> None:
        """Mark a directory as opaque.  Raises: OSError: the file system does not support it."""
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            number = self._ask(_SET, descriptor)
        finally:
            os.close(descriptor)
        if number:
            raise OSError(number, os.strerror(number), directory)

    def mark_of(self, descriptor: int) -> int:
        """Return overlayfs's mark of an open directory: ``PLAIN``, ``OPAQUE`` or ``MOVED``.  Raises: OSError."""
        return self._ask(_GET, descriptor)

    def _ask(self, request: bytes, descriptor: int) -> int:
        socket.send_fds(self._socket, [request], [descriptor])
        response = self._socket.recv(4)
        if len(response) != 4:
            raise OSError(5, "the helper of the archive worker has ended")
        return int.from_bytes(response, "little")


def _mark(requests: socket.socket) -> None:
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 1, 1)
        if not message or len(descriptors) != 1:
            return
        try:
            number = _mark_of(descriptors[0]) if message == _GET else _set_mark(descriptors[0])
        finally:
            os.close(descriptors[0])
        requests.send(number.to_bytes(4, "little"))


def _set_mark(descriptor: int) -> int:
    """Mark a directory, and return 0 or the number of the error."""
    try:
        os.setxattr(descriptor, _OPAQUE, b"y")
    except OSError as error:
        return error.errno or 5
    return 0


def _mark_of(descriptor: int) -> int:
    names = {os.fsencode(name) for name in os.listxattr(descriptor)}
    if not names.isdisjoint(_ELSEWHERE):
        return Helper.MOVED
    # Values other than "y" describe the directory's entries.
    is_opaque = _OPAQUE in names and os.getxattr(descriptor, _OPAQUE) == b"y"
    return Helper.OPAQUE if is_opaque else Helper.PLAIN


def _drop_capabilities() -> None:
    kept = sum(1 << number for number in _CAPABILITIES.values())
    for number in range(64):
        if not kept >> number & 1:
            _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0))
    sets = ctypes.create_string_buffer(24)
    if _libc.capget(header, sets) != 0:
        return
    # Effective, permitted and inheritable sets, each as a lower and an upper half.
    _, permitted, _, _, _, _ = struct.unpack("=6I", sets.raw)
    left = permitted & kept
    _libc.capset(header, ctypes.create_string_buffer(struct.pack("=6I", left, left, 0, 0, 0, 0)))


def _filter(machine: str) -> bytes:
    """Return a classic BPF program over ``struct seccomp_data``.  Empty if the machine's call numbers are not known."""
    if machine not in _REFUSED:
        return b""
    refused = sorted({*_REFUSED[machine], *_MOUNT_CALLS})
    load, equal, at_least, verdict = 0x20, 0x15, 0x35, 0x06
    program = [
        (load, 0, 0, 4),  # the architecture
        (equal, 1, 0, _AUDIT_ARCH[machine]),
        (verdict, 0, 0, _KILL),
        (load, 0, 0, 0),  # the call
        (at_least, len(refused) + 1, 0, _X32_BIT),
    ]
    program += [(equal, len(refused) - index, 0, number) for index, number in enumerate(refused)]
    program += [(verdict, 0, 0, _ALLOW), (verdict, 0, 0, _REFUSE)]
    return b"".join(struct.pack("=HBBI", *one) for one in program)


def _install(program: bytes) -> None:
    if not program:
        return
    code = ctypes.create_string_buffer(program)
    length = len(program) // 8
    header = struct.pack("@HxxxxxxP", length, ctypes.addressof(code))
    _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.create_string_buffer(header), 0, 0)
