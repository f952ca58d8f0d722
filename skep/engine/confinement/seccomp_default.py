"""The default seccomp profile: the system calls that a container may make.  Data, and its form in Docker's JSON.

Calls that are not listed fail with EPERM.  The rules are the same as Docker's own default (moby/profiles, seccomp
v0.2.3), and tests/unit/engine/test_default_profile.py has digests of all of them.  runc ignores names that libseccomp
does not know.
"""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any, Final, NamedTuple

# ``chown{,32}`` stands for chown and chown32.
_ALLOWED: Final = """
    access creat open openat{,2} close{,_range} mknod{,at} mkdir{,at} rmdir link{,at} symlink{,at} unlink{,at}
    rename{,at,at2} readlink{,at} chdir fchdir getcwd chmod fchmod{,at,at2} umask truncate{,64} ftruncate{,64}
    chown{,32} fchown{,32} lchown{,32} fchownat faccessat{,2} utime{,s} utimensat{,_time64} futimesat
    stat{,64,fs,fs64,x,mount} fstat{,64,fs,fs64} lstat{,64} fstatat64 newfstatat listmount name_to_handle_at
    getdents{,64} read{,v,ahead} write{,v} pread{64,v,v2} pwrite{64,v,v2} lseek _llseek sendfile{,64} splice tee
    vmsplice copy_file_range fallocate fadvise64{,_64} cachestat sync{,fs,_file_range} fsync fdatasync dup{,2,3}
    pipe{,2} fcntl{,64} flock ioctl inotify_{init,init1,add_watch,rm_watch} fanotify_mark memfd_{create,secret}
    {,f,l}getxattr {,f,l}setxattr {,f,l}listxattr {,f,l}removexattr {get,set,list,remove}xattrat

    select _newselect poll ppoll{,_time64} pselect6{,_time64} eventfd{,2} signalfd{,4}
    epoll_{create,create1,ctl,ctl_old,wait,wait_old,pwait,pwait2}
    io_{setup,submit,cancel,destroy,getevents,pgetevents,pgetevents_time64}

    accept{,4} bind connect listen shutdown socketpair socketcall getsockname getpeername {get,set}sockopt
    send{,to,msg,mmsg} recv{,from,msg,mmsg,mmsg_time64}

    brk mmap{,2} munmap mremap mprotect madvise mincore msync mseal mlock{,2,all} munlock{,all} remap_file_pages
    membarrier map_shadow_stack pkey_{alloc,free,mprotect} process_mrelease

    ipc msg{ctl,get,rcv,snd} sem{ctl,get,op,timedop,timedop_time64} shm{at,ctl,dt,get}
    mq_{open,unlink,notify,getsetattr,timedsend,timedsend_time64,timedreceive,timedreceive_time64}
    futex{,_time64,_wait,_waitv,_wake,_requeue} {get,set}_robust_list rseq

    fork vfork execve{,at} exit{,_group} wait{4,id,pid} pidfd_{open,send_signal} restart_syscall prctl seccomp
    landlock_{create_ruleset,add_rule,restrict_self} uretprobe riscv_hwprobe
    kill tkill tgkill pause alarm sigaltstack sigprocmask sigreturn rt_sigreturn rt_tgsigqueueinfo
    rt_sig{action,pending,procmask,queueinfo,suspend,timedwait,timedwait_time64}
    getpid getppid gettid getpgrp {get,set}pgid {get,set}sid set_tid_address {get,set}_thread_area
    {get,set}{,res,fs}{uid,gid}{,32} gete{uid,gid}{,32} setre{uid,gid}{,32} {get,set}groups{,32} cap{get,set}
    {get,set}rlimit ugetrlimit prlimit64 {get,set}priority ioprio_{get,set} getrusage getcpu sysinfo uname getrandom
    sched_{get,set}{affinity,attr,param,scheduler} sched_get_priority_{max,min} sched_rr_get_interval{,_time64}
    sched_yield

    time times gettimeofday adjtimex clock_adjtime{,64} clock_{getres,gettime,nanosleep}{,_time64} nanosleep
    {get,set}itimer timer_{create,delete,getoverrun} timer_{get,set}time{,64} timerfd_create timerfd_{get,set}time{,64}
"""
_IRREGULAR: Final = {
    "clock_gettime_time64": "clock_gettime64",  # the only one of its family without the suffix
    "getfsuid": None,
    "getfsgid": None,
    "getfsuid32": None,
    "getfsgid32": None,
}
"""Names that the patterns above produce wrongly, with the real name, or None if the call does not exist."""


class ArgumentCondition(NamedTuple):
    """Condition on an argument of a call.  The ``operation`` MASKED_EQ means that no bit of ``value`` is set."""

    operation: str
    value: int
    argument: int = 0


class Group(NamedTuple):
    """Calls that are allowed if all of the group's conditions hold."""

    names: str
    having: str = ""
    """Capability that the container must have."""
    lacking: str = ""
    """Capability that the container must not have."""
    architectures: str = ""
    """Architectures (by their names in Go) to which the group is limited.  Empty for all."""
    elsewhere: str = ""
    """Architectures to which the group does not apply."""
    kernel: str = ""
    """First kernel version to which the group applies."""
    condition: ArgumentCondition | None = None
    errno: int = 0
    """Error number with which the call fails instead of being allowed."""


# Source: linux/socket.h.
_AF_ALG, _AF_VSOCK = 38, 40
_NEW_NAMESPACES = 0x7E020000
"""Flags that create namespaces: CLONE_NEWNS, CLONE_NEWCGROUP, and the same for UTS, IPC, USER, PID and NET."""
_PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)
"""Allowed arguments of personality(2): PER_LINUX and PER_LINUX32, each with or without UNAME26, and the query of the
current value.
"""
# Source: asm-generic/errno.h: moby lists the error that a denied call returns as a number.
_ENOSYS = 38
_TRACING = "ptrace process_vm_{readv,writev}"

_GROUPS: Final = (
    Group(_TRACING, kernel="4.8"),  # before 4.8, a tracer could bypass its own filter
    Group("socket", condition=ArgumentCondition("LT", _AF_ALG)),
    Group("socket", condition=ArgumentCondition("EQ", _AF_ALG + 1)),
    Group("socket", condition=ArgumentCondition("GT", _AF_VSOCK)),
    *(Group("personality", condition=ArgumentCondition("EQ", value)) for value in _PERSONALITIES),
    Group("sync_file_range2 swapcontext", architectures="ppc64le"),
    Group(
        "arm_{fadvise64_64,sync_file_range} sync_file_range2 breakpoint cacheflush set_tls",
        architectures="arm arm64",
    ),
    Group("arch_prctl", architectures="amd64 x32"),
    Group("modify_ldt", architectures="amd64 x32 x86"),
    Group("s390_pci_mmio_{read,write} s390_runtime_instr", architectures="s390 s390x"),
    Group("riscv_flush_icache", architectures="riscv64"),
    Group("open_by_handle_at", having="CAP_DAC_READ_SEARCH"),
    Group(
        "clone{,3} unshare setns mount{,_setattr} move_mount open_tree umount{,2} fs{open,config,mount,pick} bpf"
        " perf_event_open fanotify_init lookup_dcookie quotactl{,_fd} set{domain,host}name syslog"
        " lsm_{get,set}_self_attr lsm_list_modules",
        having="CAP_SYS_ADMIN",
    ),
    Group(
        "clone",
        lacking="CAP_SYS_ADMIN",
        elsewhere="s390 s390x",
        condition=ArgumentCondition("MASKED_EQ", _NEW_NAMESPACES),
    ),
    Group(
        "clone",
        lacking="CAP_SYS_ADMIN",
        architectures="s390 s390x",
        condition=ArgumentCondition("MASKED_EQ", _NEW_NAMESPACES, argument=1),  # there the flags come second
    ),
    # Its flags are in memory, which a filter cannot read.  C libraries then use clone.
    Group("clone3", lacking="CAP_SYS_ADMIN", errno=_ENOSYS),
    Group("reboot", having="CAP_SYS_BOOT"),
    Group("chroot", having="CAP_SYS_CHROOT"),
    Group("{,f}init_module delete_module", having="CAP_SYS_MODULE"),
    Group("acct", having="CAP_SYS_PACCT"),
    Group(f"kcmp pidfd_getfd process_madvise {_TRACING}", having="CAP_SYS_PTRACE"),
    Group("iopl ioperm", having="CAP_SYS_RAWIO"),
    Group("settimeofday stime clock_settime{,64}", having="CAP_SYS_TIME"),
    Group("vhangup", having="CAP_SYS_TTY_CONFIG"),
    Group("mbind get_mempolicy set_mempolicy{,_home_node}", having="CAP_SYS_NICE"),
    Group("syslog", having="CAP_SYSLOG"),
    Group("bpf", having="CAP_BPF"),
    Group("perf_event_open", having="CAP_PERFMON"),
)
_SUB_ARCHITECTURES: Final = {
    "X86_64": "X86 X32",
    "AARCH64": "ARM",
    "MIPS64": "MIPS MIPS64N32",
    "MIPS64N32": "MIPS MIPS64",
    "MIPSEL64": "MIPSEL MIPSEL64N32",
    "MIPSEL64N32": "MIPSEL MIPSEL64",
    "S390X": "S390",
    "RISCV64": "",
    "LOONGARCH64": "",
}
_BRACES = re.compile(r"\{([^{}]*)\}")


@cache
def profile() -> dict[str, Any]:
    """Return the profile in Docker's JSON, with unevaluated conditions."""
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 1,
        "archMap": [
            {
                "architecture": f"SCMP_ARCH_{name}",
                "subArchitectures": [f"SCMP_ARCH_{one}" for one in others.split()],
            }
            for name, others in _SUB_ARCHITECTURES.items()
        ],
        "syscalls": [_rule(Group(_ALLOWED)), *map(_rule, _GROUPS)],
    }


def _rule(group: Group) -> dict[str, Any]:
    includes = {
        "caps": group.having.split(),
        "arches": group.architectures.split(),
        "minKernel": group.kernel,
    }
    excludes = {"caps": group.lacking.split(), "arches": group.elsewhere.split()}
    rule: dict[str, Any] = {
        "names": list(_names(group.names)),
        "action": "SCMP_ACT_ERRNO" if group.errno else "SCMP_ACT_ALLOW",
        "includes": {key: value for key, value in includes.items() if value},
        "excludes": {key: value for key, value in excludes.items() if value},
    }
    if group.errno:
        rule["errnoRet"] = group.errno
    if group.condition is not None:
        operation, value, argument = group.condition
        rule["args"] = [{"index": argument, "value": value, "op": f"SCMP_CMP_{operation}"}]
    return rule


def _names(text: str) -> Iterator[str]:
    for word in text.split():
        for name in _expanded(word):
            known = _IRREGULAR.get(name, name)
            if known is not None:
                yield known


def _expanded(word: str) -> Iterator[str]:
    braces = _BRACES.search(word)
    if braces is None:
        yield word
        return
    for choice in braces[1].split(","):
        yield from _expanded(word[: braces.start()] + choice + word[braces.end() :])
