"""Which process of a node ``ps`` names."""

import asyncio
import os
import signal
import subprocess
from pathlib import Path

import msgspec
import pytest

from skep.errors import Unavailable
from skep.linux.processes import start_ticks_of
from skep.playground.node import (
    Holder,
    daemon_command,
    daemon_pid,
    described,
    is_paused,
    keeps_stopping,
    runs_as_configured,
    written_so_far,
)
from tests.support.machines.daemon_rig import wait_until


def test_the_pid_of_a_node_is_its_daemons_and_not_its_holders(tmp_path: Path) -> None:
    node = described(tmp_path, "demo", "w1", "worker", "192.168.100.13")
    assert daemon_pid(node) is None
    # As tini, the holder's shell and the daemon; ``:`` keeps each shell from becoming what it runs.
    words = ["/bin/sh", "-c", "/bin/sh -c 'cat; :'; :"]
    holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        holder.stdin.write(b"x")
        holder.stdin.flush()
        assert holder.stdout.read(1) == b"x"  # cat runs
        started = start_ticks_of(holder.pid)
        assert started is not None
        up = msgspec.structs.replace(node, pids=(holder.pid,), started=started)
        pid = daemon_pid(up)
        assert Path(f"/proc/{pid}/comm").read_text() == "cat\n"
        assert pid is not None
        assert not is_paused(up)
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: is_paused(up), "the daemon of a paused node is stopped")
        os.kill(pid, signal.SIGCONT)
        wait_until(lambda: not is_paused(up), "the daemon of a resumed node runs")
        assert daemon_pid(msgspec.structs.replace(up, started=started + 1)) is None
    finally:
        holder.stdin.close()
        holder.wait()
        holder.stdout.close()


def test_a_daemon_that_ended_three_times_keeps_stopping(tmp_path: Path) -> None:
    node = described(tmp_path, "demo", "w1", "worker", "192.168.100.13")
    assert not keeps_stopping(node)
    ends = tmp_path / "w1" / "ends"
    ends.parent.mkdir()
    ends.write_text("1\n1\n")
    assert not keeps_stopping(node)
    ends.write_text("1\n1\n1\n")
    assert keeps_stopping(node)


def test_a_failed_start_shows_only_what_was_written_since_and_each_line_once(tmp_path: Path) -> None:
    node = described(tmp_path, "demo", "w1", "worker", "192.168.100.13")
    log = tmp_path / "skep.log"
    log.write_text("a task of yesterday\nskep daemon: no setting 'a'\n")
    holder = Holder(node, tmp_path, subprocess.Popen(["true"]), written_so_far(tmp_path))
    with log.open("a") as appended:
        appended.write("skep daemon: no setting 'b'\n" * 3)
    with pytest.raises(Unavailable) as failure:
        asyncio.run(holder.wait_for_api(""))
    assert str(failure.value).splitlines()[1:] == ["  skep daemon: no setting 'b'"]


def test_a_daemon_that_was_started_with_other_hosts_does_not_run_as_configured(tmp_path: Path) -> None:
    node = described(tmp_path, "demo", "w1", "worker", "192.168.100.13")
    file = tmp_path / "w1" / "skep.toml"
    file.parent.mkdir()
    file.write_text('hosts = ["tcp://127.0.0.1:1"]\n')
    holder = subprocess.Popen(
        ["/bin/sh", "-c", "read -r _; :", "holder", "--", *daemon_command(file.parent, node)],
        stdin=subprocess.PIPE,
    )
    assert holder.stdin is not None
    try:
        up = msgspec.structs.replace(node, pids=(holder.pid,))
        wait_until(lambda: runs_as_configured(tmp_path, up), "the shell has its command line")
        file.write_text('hosts = ["tcp://127.0.0.1:2"]\n')
        assert not runs_as_configured(tmp_path, up)
    finally:
        holder.stdin.close()
        holder.wait()
