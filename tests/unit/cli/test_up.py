"""What `skep up` finds on machines, and what it refuses before it changes anything."""

import os
import socket
import subprocess
from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from skep.api.client.client import ApiClient
from skep.cli.main import main
from skep.cli.stack.stack_screens import ProgressPrinter
from skep.cli.start.machines import PORTS, PREFLIGHT, START, PreflightFacts, facts_of, problems
from skep.cli.start.up import DesiredCluster, TargetMachine, install, join
from skep.errors import FailedPrecondition, InvalidArgument, Unavailable

NOW = 1_800_000_000.0
GOOD = PreflightFacts(
    uid=0, kernel="6.1.0-18-amd64", time_s=NOW, os="Debian 12", free_kib=50 << 20, skep="0.1.0", has_systemd=True,
    has_apt=True, is_whole=True,
)  # fmt: skip


def bad(*, has_package: bool = False, **changes: object) -> list[str]:
    return problems(replace(GOOD, **changes), NOW - 1, NOW + 1, has_package=has_package)


def test_the_script_finds_the_facts_of_this_machine() -> None:
    done = subprocess.run(
        ["sh", "-s"], input=PREFLIGHT, capture_output=True, text=True, check=True, timeout=60
    )
    facts = facts_of(done.stdout)
    assert facts.is_whole
    assert facts.uid >= 0
    assert facts.kernel
    assert facts.os
    assert facts.free_kib > 0
    assert facts.time_s > 1_700_000_000


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_the_script_finds_ports_that_are_taken(family: socket.AddressFamily, address: str) -> None:
    ports = " ".join(map(str, PORTS))
    with socket.socket(family) as taken, socket.socket(family) as bound:
        for one in (taken, bound):
            one.bind((address, 0))
        taken.listen()
        numbers = [one.getsockname()[1] for one in (taken, bound)]
        script = PREFLIGHT.replace(f"for port in {ports};", f"for port in {numbers[0]} {numbers[1]};")
        done = subprocess.run(
            ["sh", "-s"], input=script, capture_output=True, text=True, check=True, timeout=60
        )
    assert facts_of(done.stdout).taken == (numbers[0],)


def test_a_machine_that_will_do_has_no_problem() -> None:
    assert bad() == []
    assert bad(runs=True, taken=(2377,), has_systemd=False) == []
    assert bad(skep="", has_package=True) == []
    assert bad(skep="", runs=True) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"is_whole": False}, "The check did not finish"),
        ({"uid": 1000}, "Use root@MACHINE"),
        ({"kernel": "4.19.0"}, "Use at least 5.10"),
        ({"kernel": "5.9.1"}, "Use at least 5.10"),
        ({"kernel": "?"}, "Use at least 5.10"),
        ({"time_s": NOW + 60}, "The clock is wrong by 59 s"),
        ({"time_s": NOW - 60}, "The clock is wrong by 58 s"),
        ({"free_kib": 100 << 10}, "100 MiB are free"),
        ({"taken": (2377, 2378)}, "Other programs use the ports 2377, 2378"),
        ({"skep": ""}, "Install it with --package skep.deb"),
        ({"skep": "", "has_package": True, "has_apt": False}, "no apt-get to install"),
        ({"has_systemd": False}, "no systemd to start it"),
    ],
)
def test_each_problem_names_what_to_do(changes: dict[str, object], said: str) -> None:
    (problem,) = bad(**changes)  # type: ignore[arg-type]
    assert said in problem


def test_a_machine_is_named_as_for_ssh_and_options_cannot_be_smuggled() -> None:
    command = TargetMachine.of("root@m1").command(["sh", "-s"])
    assert command[-4:] == ["--", "m1", "sh", "-s"]
    assert command[command.index("-l") + 1] == "root"
    assert "BatchMode=yes" in command
    assert TargetMachine.of("ssh://root@m1:2222/x.sock").destination.port == 2222
    for word in ("-oProxyCommand=x", "root@-oProxyCommand=x"):
        with pytest.raises(InvalidArgument):
            TargetMachine.of(word)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["root@m1", "root@m1"], "A machine is listed twice"),
        (["--advertise-addr", "10.0.0.1", "root@m1"], "each machine has another address"),
        (["--package", __file__, "root@m1"], "is not a Debian package"),
    ],
)
def test_wrong_calls_reach_no_machine(words: list[str], said: str) -> None:
    done = CliRunner().invoke(main, ["up", *words])
    assert (done.exit_code, said in done.output) == (1, True)


SSH = """#!/bin/sh
for word; do case $word in root|m*) machine=$word ;; esac; done
echo "$@" >> {folder}/asked
touch {folder}/here-$machine
until [ "$(ls {folder}/here-* | wc -l)" -ge 3 ]; do sleep 0.02; done
case $machine in m2) uid=1000 ;; *) uid=0 ;; esac
cat <<EOF
uid $uid
kernel 6.1.0
time $(date +%s)
os Debian
free 50000000
skep 0.1.0
systemd yes
{end}
EOF
"""
"""Machines that respond when all three have been asked; m2's user is not root."""


def up(folder: Path, *words: str, end: str = "end yes") -> tuple[int, str, list[str]]:
    """Exit code, output, and what ssh was asked for."""
    (folder / "ssh").write_text(SSH.format(folder=folder, end=end))
    (folder / "ssh").chmod(0o755)
    done = CliRunner().invoke(main, ["up", *words], env={"PATH": f"{folder}:{os.environ['PATH']}"})
    return done.exit_code, done.output, (folder / "asked").read_text().splitlines()


def test_machines_are_looked_at_at_once_and_a_dry_run_does_nothing_more(tmp_path: Path) -> None:
    code, output, asked = up(tmp_path, "--dry-run", "root@m1", "root@m3", "root@m4")
    assert code == 0, output
    for machine in ("m1", "m3", "m4"):
        assert f"root@{machine}: suitable: Debian, kernel 6.1.0" in output
    assert len(asked) == 3
    assert all(line.endswith("sh -s") for line in asked)


def test_nothing_is_changed_unless_all_machines_will_do(tmp_path: Path) -> None:
    code, output, asked = up(tmp_path, "root@m1", "root@m2", "root@m3")
    assert code == 1
    assert output.splitlines()[-2:] == [
        "Error: root@m2: The user is not root. Use root@MACHINE.",
        "Nothing was changed. Fix the problem and rerun the command.",
    ]
    assert "root@m1: suitable" in output
    assert len(asked) == 3
    code, output, _ = up(tmp_path, "root@m1", "root@m3", "root@m4", end="")
    assert "root@m4: The check did not finish" in output


REMOTE = """#!/bin/sh
while [ "$1" != -- ]; do shift; done
shift 2
PATH={folder}/there:$PATH exec sh -c "$*"
"""
"""An ssh that runs commands here, with the programs in ``there`` before others."""
APT = """#!/bin/sh
for file; do :; done
echo "$(stat -c %a "$file") $*" >{folder}/installed
cat "$file" >{folder}/content
"""
SYSTEMCTL = """#!/bin/sh
echo "$*" >>{folder}/started
[ -e {folder}/broken ] || touch {folder}/skep.sock
"""


async def test_the_package_is_sent_installed_without_a_question_and_the_node_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    for name, text in (("ssh", REMOTE), ("there/apt-get", APT), ("there/systemctl", SYSTEMCTL)):
        (tmp_path / name).write_text(text.format(folder=tmp_path))
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    start = START.replace("-S /run/skep/skep.sock", f"-e {tmp_path}/skep.sock").replace("-gt 60", "-gt 1")
    package = tmp_path / "skep_1.deb"
    package.write_bytes(os.urandom(300_000))
    wanted = DesiredCluster(package=package)
    await install(TargetMachine.of("root@m1"), replace(GOOD, skep=""), wanted, ProgressPrinter(), start)
    mode, _, words = (tmp_path / "installed").read_text().strip().partition(" ")
    assert (mode, (tmp_path / "content").read_bytes()) == ("644", package.read_bytes())
    assert " install -y " in words
    assert not Path(words.rpartition(" ")[2]).exists(), "the package is removed"
    assert (tmp_path / "started").read_text() == "enable --now skep\n"
    await install(TargetMachine.of("root@m1"), replace(GOOD, runs=True), wanted, ProgressPrinter())
    assert (tmp_path / "started").read_text() == "enable --now skep\n", "a node that runs is left"
    (tmp_path / "skep.sock").unlink()
    (tmp_path / "broken").touch()
    with pytest.raises(Unavailable, match=r"^Skep does not start\. Run journalctl -u skep on the machine\.$"):
        await install(TargetMachine.of("root@m1"), GOOD, wanted, ProgressPrinter(), start)


class Node:
    """A machine's API, which is in a cluster already."""

    def __init__(self, state: str) -> None:
        self._state = state

    async def __aenter__(self) -> "Node":
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def get(self, path: str, **_: object) -> object:
        assert path == "/info"
        return {"Swarm": {"LocalNodeState": self._state, "NodeID": "theirs"}}


class MachineInCluster(TargetMachine, frozen=True):
    """A machine that runs a node of a cluster."""

    state: str = "active"

    def client(self) -> ApiClient:
        node: Any = Node(self.state)
        return cast("ApiClient", node)


async def test_a_machine_of_another_cluster_is_refused_and_one_of_this_is_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    machine = TargetMachine.of("m2")
    rest = (MachineInCluster(machine.word, machine.destination), "Manager", "192.0.2.1:2377", {})
    with pytest.raises(
        FailedPrecondition, match=r"it is in another cluster \(active\)\. Run docker swarm leave there"
    ):
        await join(*rest, {"ours": "manager"}, DesiredCluster(), ProgressPrinter())
    await join(*rest, {"theirs": "worker"}, DesiredCluster(), ProgressPrinter())
    assert (
        "m2: already in the cluster as a worker. To make it a manager, run docker node promote theirs"
        in capsys.readouterr().err
    )


async def test_a_manager_that_is_locked_or_starts_is_not_taken_for_a_worker(
    capsys: pytest.CaptureFixture[str],
) -> None:
    destination = TargetMachine.of("m2").destination
    rest = ("Manager", "192.0.2.1:2377", {}, {"theirs": "manager"}, DesiredCluster(), ProgressPrinter())
    with pytest.raises(FailedPrecondition, match=r"it is locked\. Run docker swarm unlock there"):
        await join(MachineInCluster("m2", destination, "locked"), *rest)
    await join(MachineInCluster("m2", destination, "pending"), *rest)
    assert capsys.readouterr().err.strip().endswith("m2: already in the cluster")


async def test_of_what_a_machine_writes_the_end_is_kept_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text("#!/bin/sh\ncat >/dev/null; head -c 20000000 /dev/zero; echo end yes\n")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    text = await TargetMachine.of("root@m1").run(["sh", "-s"], b"x" * 1_000_000, timeout_s=60)
    assert text.endswith("end yes\n")
    assert len(text) <= 64 << 10
    ssh.write_text("#!/bin/sh\nexec >&-; head -c 20000000 /dev/zero >&2; printf '\\nwhy\\n' >&2; exit 1\n")
    with pytest.raises(Unavailable, match=r"\Awhy\Z"):
        await TargetMachine.of("root@m1").run(["sh", "-s"], b"x" * 1_000_000, timeout_s=60)
    ssh.write_text("#!/bin/sh\nexec cat /dev/zero\n")
    with pytest.raises(Unavailable, match=r"not done within 0\.5 s"):
        await TargetMachine.of("root@m1").run(["sh", "-s"], b"x" * 1_000_000, timeout_s=0.5)


def test_what_a_machine_says_of_itself_reaches_no_terminal_uncleaned(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ProgressPrinter().show("m1", f"suitable: {replace(GOOD, os='Debian' + chr(27) + '[2J').summary}")
    assert "m1: suitable: Debian[2J, kernel" in capsys.readouterr().err
