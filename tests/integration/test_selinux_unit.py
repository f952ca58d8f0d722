"""The Debian package's node under SELinux, as a service of systemd: ``SELINUX=1 SYSTEMD=1 make virtual SUITE=trixie``.

The package is installed on the machine itself, as docs/guide/security.md says, and systemd gives the node its domain.
"""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from skep.playground.images.busybox import busybox_archive
from tests.support.machines.daemon_rig import wait_until

_ROOT = Path(__file__).parents[2]
_ENFORCE = Path("/sys/fs/selinux/enforce")
_PATIENT = Path("/etc/systemd/system/skep.service.d/patient.conf")
_DOMAIN = "system_u:system_r:initrc_t:s0"
_CONTAINERS = "system_u:system_r:container_t:s0:c"
_ADDRESS = "198.51.100.9"
_STAY = "trap exit TERM; while :; do sleep 3600 & wait $!; done"
_IMAGE = "busybox:1"
_SLOW_S = 600
"""Seconds that a wait may take, because the machine's processor is emulated."""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(
        os.environ.get("SKEP_VIRTUAL") != "1"
        or not Path("/run/systemd/system").is_dir()
        or not _ENFORCE.exists()
        or _ENFORCE.read_text() != "1",
        reason="it installs the package on a machine that systemd booted and whose kernel enforces an SELinux policy: "
        "docs/untested.md",
    ),
]


def run(*words: str | Path, within_s: float = _SLOW_S, stdin: bytes | None = None, check: bool = True) -> str:
    """Run a command on the machine, and return its output."""
    done = subprocess.run(words, input=stdin, capture_output=True, timeout=within_s, check=False)
    errors = done.stderr.decode(errors="replace")
    assert not check or done.returncode == 0, f"{words}: {done.stdout.decode()}{errors}"
    return done.stdout.decode() + ("" if check else errors)


def docker(*words: str, **options: Any) -> str:
    command = shutil.which("docker", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") or "docker"
    return run(command, "--host", "unix:///run/skep/skep.sock", *words, **options)


def domain(pid: str | int) -> str:
    """Return the label of a process."""
    return Path(f"/proc/{pid}/attr/current").read_text().strip("\0\n")


def main_pid() -> str:
    return run("systemctl", "show", "--property", "MainPID", "--value", "skep").strip()


def inspected(container: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(docker("inspect", container))[0]
    return found


def tasks(service: str) -> list[str]:
    """Return the ids of the service's containers that run."""
    wanted = f"label=com.docker.swarm.service.name={service}"
    return docker("ps", "--quiet", "--filter", wanted, check=False).split()


def denials() -> list[str]:
    """Return what the kernel has denied to the node and to its runtime."""
    lines = (line for line in run("dmesg").splitlines() if "avc:  denied" in line)
    return [line for line in lines if re.search(r"scontext=\S+:(initrc|container_engine)_t:", line)]


@pytest.fixture
def node() -> Iterator[None]:
    """Install the package, and switch SELinux on for its node."""
    (package,) = (_ROOT / "dist").glob("skep_*.deb")
    run("ip", "link", "add", "outside", "type", "dummy")
    run("ip", "address", "add", f"{_ADDRESS}/24", "dev", "outside")
    run("ip", "link", "set", "outside", "up")
    _PATIENT.parent.mkdir(exist_ok=True)
    _PATIENT.write_text(f"[Service]\nTimeoutStartSec={_SLOW_S}\n")
    run("dpkg", "--install", package, within_s=1200)
    try:
        with Path("/etc/skep/skep.toml").open("a") as settings:
            settings.write("selinux-enabled = true\n")
        run("systemctl", "restart", "skep")
        yield
    finally:
        print(docker("service", "ps", "--no-trunc", "web", check=False))
        run("dpkg", "--purge", "skep")
        run("ip", "link", "delete", "outside")
        shutil.rmtree(_PATIENT.parent)


def test_the_packages_unit_runs_confined_containers_that_outlive_it(node: None, tmp_path: Path) -> None:
    assert domain(main_pid()) == _DOMAIN
    assert domain(1) == "system_u:system_r:init_t:s0", "systemd chose the domain"
    assert "name=selinux" in docker("info", "--format", "{{.SecurityOptions}}")
    docker("load", stdin=asyncio.run(busybox_archive()).data)
    (tmp_path / "file").write_text("the machine's\n")
    docker("run", "--detach", "--name", "plain", "--volume", f"{tmp_path}:/x", _IMAGE, "sh", "-c", _STAY)
    plain = inspected("plain")
    assert plain["ProcessLabel"].startswith(_CONTAINERS)
    assert domain(plain["State"]["Pid"]) == plain["ProcessLabel"]
    refused = docker("exec", "plain", "cat", "/x/file", check=False)
    assert refused == "cat: can't open '/x/file': Permission denied\n"

    # An emulated node may return after the 15 s of three usual heartbeats, and its tasks would be those of a lost node.
    docker("swarm", "init", "--advertise-addr", _ADDRESS, "--dispatcher-heartbeat", "60s")
    docker("secret", "create", "hidden", "-", stdin=b"correct horse")
    docker("network", "create", "--driver", "overlay", "inner")
    words = ("--detach", "--name", "web", "--secret", "hidden", "--network", "inner", "--publish", "8080:80")
    serve = f"cp /run/secrets/hidden /data/index.html; httpd -p 80 -h /data; {_STAY}"
    volume = ("--mount", "type=volume,source=data,target=/data")
    docker("service", "create", *words, *volume, _IMAGE, "sh", "-c", serve)
    (task,) = wait_until(lambda: tasks("web"), "a task runs", _SLOW_S)
    fetch = ("curl", "--silent", "--max-time", "5", f"http://{_ADDRESS}:8080/")
    wait_until(lambda: run(*fetch, check=False) == "correct horse", "the published port answers", _SLOW_S)
    served = inspected(task)
    assert served["ProcessLabel"].startswith(_CONTAINERS)
    assert served["ProcessLabel"] != plain["ProcessLabel"]

    for end in ("restart", "kill --signal=KILL --kill-whom=main"):
        before = main_pid()
        run("systemctl", *end.split(), "skep")
        wait_until(lambda before=before: main_pid() not in (before, "0"), "a new daemon", _SLOW_S)
        wait_until(lambda: tasks("web") == [task], "the node answers, and the task is the same", _SLOW_S)
        assert domain(main_pid()) == _DOMAIN
        for name, known in (("plain", plain), (task, served)):
            now = inspected(name)
            assert (now["State"]["Pid"], now["State"]["StartedAt"]) == (
                known["State"]["Pid"],
                known["State"]["StartedAt"],
            ), f"it ran on after systemctl {end}"
            assert domain(now["State"]["Pid"]) == known["ProcessLabel"]
            assert (
                docker("exec", name, "cat", "/proc/self/attr/current").strip("\0\n") == known["ProcessLabel"]
            )
        assert docker("exec", task, "cat", "/data/index.html") == "correct horse"
        docker(
            "run",
            "--rm",
            "--volume",
            "data:/data",
            _IMAGE,
            "sh",
            "-c",
            "echo correct horse >/data/index.html",
        )
        wait_until(lambda: run(*fetch, check=False) == "correct horse\n", "the port answers", _SLOW_S)
        docker("exec", task, "cp", "/run/secrets/hidden", "/data/index.html")
    assert denials() == []
