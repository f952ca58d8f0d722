import os
import subprocess

from skep.linux.processes import Stat, boot_id, open_pidfd, parsed_stat, start_ticks_of, stat_of


def test_a_command_with_blanks_and_parentheses_is_read() -> None:
    stat = b"17 (a) b (c)) S " + b" ".join(str(n).encode() for n in range(4, 53))
    assert parsed_stat(stat) == Stat(pid=17, state="S", start_ticks=22)


def test_a_process_that_waits_to_be_reaped_has_ended() -> None:
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        found = stat_of(process.pid)
        assert found is not None
        assert found.has_ended
        assert start_ticks_of(process.pid) is None


def test_a_pid_with_another_start_time_is_another_process() -> None:
    pid = os.getpid()
    started = start_ticks_of(pid)
    assert started is not None
    assert open_pidfd(pid, started + 1) is None
    descriptor = open_pidfd(pid, started)
    assert descriptor is not None
    os.close(descriptor)


def test_a_boot_has_an_id() -> None:
    assert boot_id() == boot_id() != ""
