"""A course on three machines, step by step as a person would type it: ``setup/course.sh`` prepares them.

Every step that fails ends the course.  The log has each command with its machine, and how long each wait took.
"""

import asyncio
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urljoin
from urllib.request import urlopen

from skep.playground.images.busybox import busybox_archive
from tests.support.courses.machines import Machine, call, frames, say, served, until, up
from tests.support.harness.built_pages import BuiltPage

INSTALLED_S = 60.0
"""Seconds from the install script to a running cluster of one node, that a bare machine may take."""
INSTALLS_WITHIN_S = 1800.0
"""Seconds that the install script may take.  An emulated processor compiles the package's modules for minutes."""
SERVE = "mkdir /www; hostname >/www/index.html; exec busybox httpd -f -p 80 -h /www"
KEEP = "echo start >>/data/starts; sync; exec sleep 86400"
ENCRYPTED_PORTS = (4799, 4800)


class Course:
    """The machines, and commands for their cluster."""

    def __init__(self, machines: list[Machine], place: Path, patience: float) -> None:
        """``patience`` multiplies the time limits of waits."""
        self.machines, self.place, self._patience = machines, place, patience
        self.via = machines[0]
        """The manager that gets the commands."""

    def until(self, what: str, condition: Callable[[], Any], within_s: float = 60) -> Any:
        """Wait for a condition."""
        return until(what, condition, within_s * self._patience)

    def run(self, *command: str, within_s: float = 300) -> str:
        """Run ``docker`` or ``skep`` against the cluster."""
        self.via.client()
        say(f"$ {' '.join(command)}")
        return call(*command, within_s=within_s * self._patience, DOCKER_HOST=self.via.socket)

    def up(self, *words: str) -> None:
        """Run ``skep up``.  It has deadlines of its own, after which an emulated machine needs another run."""
        for is_last in (self._patience == 1, False, False, True):
            try:
                say(call("skep", "up", *words, within_s=1200).strip())
                return
            except AssertionError as error:
                if is_last:
                    raise
                say(f"again: {error}")

    def docker(self, *words: str) -> str:
        return self.run("docker", *words)

    def running(self, service: str) -> list[dict[str, Any]]:
        """Return the running tasks of a service."""
        found = self.via.client().services.get(service).tasks(filters={"desired-state": "running"})
        return [task for task in found if task["Status"]["State"] == "running"]

    def wait_running(self, service: str, count: int, within_s: float = 120) -> None:
        self.until(f"{count} tasks of {service} run", lambda: len(self.running(service)) == count, within_s)

    def nodes(self) -> dict[str, tuple[str, str]]:
        """Return the state and the reachability as a manager of each node, by name."""
        return {
            one["Description"]["Hostname"]: (
                one["Status"]["State"],
                (one.get("ManagerStatus") or {}).get("Reachability", "worker"),
            )
            for one in self.via.client().api.nodes()
        }

    def all_ready(self) -> bool:
        return list(self.nodes().values()).count(("ready", "reachable")) == 3

    def objects(self) -> dict[str, list[str]]:
        """Return the names of everything that was made."""
        api = self.via.client().api
        return {
            "services": sorted(one["Spec"]["Name"] for one in api.services()),
            "secrets": sorted(one["Spec"]["Name"] for one in api.secrets()),
            "configs": sorted(one["Spec"]["Name"] for one in api.configs()),
            "networks": sorted(one["Name"] for one in api.networks() if one["Scope"] == "swarm"),
        }

    def starts(self) -> dict[str, int]:
        """Return how many starts of ``keeper`` each node's volume remembers."""
        found = {}
        for machine in self.machines:
            (container,) = machine.client().containers.list(filters={"name": "keeper"})
            found[machine.name] = container.exec_run(["cat", "/data/starts"]).output.count(b"start")
        return found


def page(url: str) -> str:
    with urlopen(url, timeout=10) as response:
        return str(response.read().decode().strip())


# -- steps of both courses -------------------------------------------------------------------------------------------


def install(machine: Machine, release: str, options: str) -> None:
    command = f"curl -fsSO {release}/install.sh && sh install.sh --from {release} {options}"
    machine.ssh(command, within_s=INSTALLS_WITHIN_S)


def install_everywhere(course: Course, release: str, options: str) -> float:
    """Install the release, and make a cluster of the first machine alone.  Return the seconds that both took."""
    first, second, third = course.machines
    began = time.monotonic()
    install(first, release, options)
    course.up(f"root@{first.address}")
    took = time.monotonic() - began
    say(f"from the install script to a running cluster of one node: {took:.1f} s")
    with ThreadPoolExecutor() as both:
        # The third takes the tarball, with its own unit.
        list(both.map(install, (second, third), (release, release), (options, f"{options} --no-apt")))
    return took


def make_cluster(course: Course, managers: int) -> None:
    hosts = [f"root@{one.address}" for one in course.machines]
    course.up("--managers", str(managers), *hosts)
    course.until(
        "three nodes are ready", lambda: [one for one, _ in course.nodes().values()] == ["ready"] * 3
    )


# -- the course of the talks -----------------------------------------------------------------------------------------


def talks(course: Course) -> None:
    """Create, scale, update, roll back, kill and drain, as the talks do."""
    course.via.client().images.load(asyncio.run(busybox_archive()).data)
    course.docker("network", "create", "--driver", "overlay", "plain")
    (course.place / "secret").write_text("correct horse")
    course.docker("secret", "create", "password", str(course.place / "secret"))
    create = ("service", "create", "--detach", "--network", "plain", "--secret", "password")
    published = ("--publish", "8080:80", "--stop-grace-period", "1s")
    course.docker(*create, *published, "--name", "web", "--replicas", "6", "busybox:1", "sh", "-c", SERVE)
    course.wait_running("web", 6)
    for machine in course.machines:
        course.until(f"{machine.name} answers on 8080", lambda m=machine: page(f"http://{m.address}:8080"))
    course.docker("service", "scale", "--detach", "web=9")
    course.wait_running("web", 9)
    update = ("service", "update", "--update-parallelism", "3", "--update-order", "start-first")
    course.docker(*update, "--env-add", "VERSION=2", "web")
    course.docker("service", "update", "--rollback", "web")
    for container in course.machines[1].client().containers.list(filters={"name": "web."}):
        container.kill()
    course.wait_running("web", 9)
    course.run("skep", "node", "drain", "node3")
    course.docker("node", "update", "--availability", "active", "node3")
    course.wait_running("web", 9)
    mount = ("--mount", "type=volume,source=kept,target=/data")
    keeper = ("service", "create", "--detach", "--name", "keeper", "--mode", "global", *mount)
    course.docker(*keeper, "busybox:1", "sh", "-c", KEEP)
    course.wait_running("keeper", 3)
    say(course.run("skep", "explain", "web").strip())


def encrypted(course: Course) -> None:
    """Send a request between two nodes on an encrypted network, and one on a plain network, and look at the frames."""
    course.docker("network", "create", "--driver", "overlay", "--opt", "encrypted", "safe")
    create = ("service", "create", "--detach", "--mode", "global", "--network", "safe", "--network", "plain")
    course.docker(*create, "--name", "inside", "busybox:1", "sh", "-c", SERVE)
    course.wait_running("inside", 3)
    (client,) = course.machines[0].client().containers.list(filters={"name": "inside."})
    (server,) = course.machines[1].client().containers.list(filters={"name": "inside."})
    server.reload()
    addresses = {name: one["IPAddress"] for name, one in server.attrs["NetworkSettings"]["Networks"].items()}

    def answers(network: str) -> bool:
        url = f"http://{addresses[network]}/?marker-{network}"
        return bool(client.exec_run(["timeout", "5", "wget", "-q", "-O", "-", url]).exit_code == 0)

    with frames() as passed:
        for network in ("plain", "safe"):
            course.until(f"a task answers another node's on {network}", lambda net=network: answers(net))
    assert passed.have("marker-plain"), "the plain request was not seen, so the capture shows nothing"
    assert not passed.have("marker-safe"), "the request was readable on the wire"
    packets = sum(passed.to_port(port) for port in ENCRYPTED_PORTS)
    assert packets, "no packet went to the ports of encrypted networks"
    say(f"{packets} encrypted packets; the request is not readable in them")
    for machine in course.machines:
        machine.ssh("test -d /sys/module/wireguard && ! pgrep wireguard-go >/dev/null && uname -r")


def faults(course: Course) -> None:
    """Cut off and reboot each machine in turn.  Everything that was acknowledged is still there afterwards."""
    for number, machine in enumerate(course.machines):
        course.via = course.machines[(number + 1) % 3]
        before, starts = course.objects(), course.until("the volumes are read", course.starts)
        machine.cut()
        course.until(f"{machine.name} is down", lambda m=machine: course.nodes()[m.name][0] == "down")
        course.wait_running("web", 9)
        (course.place / "config").write_text(str(number))
        course.docker("config", "create", f"while-{machine.name}-was-away", str(course.place / "config"))
        machine.plug()
        course.until("all are ready managers", course.all_ready, 180)
        boot = machine.ssh("cat /proc/sys/kernel/random/boot_id", shows=False)
        say(f"{machine.name}: reboots")
        call("ssh", f"root@{machine.address}", "systemd-run --on-active=1 systemctl reboot", within_s=60)
        course.until(
            f"{machine.name} has booted again",
            lambda m=machine, b=boot: m.ssh("cat /proc/sys/kernel/random/boot_id", shows=False) != b,
            300,
        )
        course.until("all are ready managers", course.all_ready, 300)
        for service, count in (("web", 9), ("keeper", 3), ("inside", 3)):
            course.wait_running(service, count, 180)
        after = course.objects()
        made = {kind: sorted({*after[kind]} - {*before[kind]}) for kind in after}
        assert made == {**{kind: [] for kind in after}, "configs": [f"while-{machine.name}-was-away"]}, made
        assert all(set(before[kind]) <= set(after[kind]) for kind in after), "something was lost"
        now = course.until("the volumes are read", course.starts)
        assert all(now[name] >= starts[name] for name in now), (starts, now)
        assert now[machine.name] > starts[machine.name], (
            "the volume of the rebooted machine was kept and used"
        )
    for machine in course.machines:
        course.until(f"{machine.name} answers on 8080", lambda m=machine: page(f"http://{m.address}:8080"))
    say(course.run("skep", "status").strip())
    say(course.run("skep", "verify").strip())


# -- a newcomer's course ---------------------------------------------------------------------------------------------


def newcomer(course: Course, release: str, options: str) -> None:
    """Deploy the cookbook's web application, drain a node, lose the manager and restore it from its backup."""
    first, second, third = course.machines
    course.docker("node", "update", "--availability", "drain", first.name)
    course.docker("import", str(course.place / "debian.tar"), "debian:12")
    recipe, blocks = downloaded_recipe(course, f"{release}/site/cookbook/postgres.html")

    def block(number: int) -> str:
        return run_block(course, recipe, blocks[number], BACKUPS=second.name, NODE=first.address)

    assert block(0).endswith("added 1\nfirst\n")
    assert ".dump" in block(3)
    say(course.run("skep", "node", "drain", second.name).strip())
    assert {one["NodeID"] for one in course.running("notes_web")} == {course.running("notes_db")[0]["NodeID"]}
    assert page(f"http://{third.address}:8080") == "first"
    course.docker("node", "update", "--availability", "active", second.name)

    first.ssh("head -c 32 /dev/urandom >swarm.key && skep backup --key-file swarm.key swarm.backup")
    for name in ("swarm.key", "swarm.backup"):
        call("sh", "-c", f"ssh root@{first.address} cat {name} >{course.place}/{name}")
    first.ssh("sh install.sh --uninstall && rm -rf /var/lib/skep swarm.key swarm.backup")
    assert page(f"http://{third.address}:8080") == "first", "the application runs without its manager"
    install(first, release, options)
    for name in ("swarm.key", "swarm.backup"):
        call("sh", "-c", f"ssh root@{first.address} 'cat >{name}' <{course.place}/{name}")
    say(first.ssh("skep restore --key-file swarm.key --dry-run swarm.backup").strip())
    say(first.ssh("skep restore --key-file swarm.key --yes swarm.backup").strip())
    course.until(
        "three nodes are ready", lambda: [one for one, _ in course.nodes().values()] == ["ready"] * 3
    )
    course.docker("service", "update", "--force", "notes_web")
    assert page(f"http://{third.address}:8080") == "first"
    course.until("everything is healthy", lambda: course.run("skep", "status"))


def downloaded_recipe(course: Course, address: str) -> tuple[Path, list[str]]:
    """Download the archive that a page of the cookbook links to.  Return its folder, and the page's shell blocks."""
    built = BuiltPage(page(address))
    (archive,) = {urljoin(address, target) for target in built.links if target.endswith(".tar.gz")}
    say(f"the files of {address}: {archive}")
    packed = course.place / Path(archive).name
    with urlopen(archive, timeout=10) as response:
        packed.write_bytes(response.read())
    call("tar", "-xzf", packed, "-C", course.place)
    return course.place / packed.name.removesuffix(".tar.gz"), built.shell_blocks


def run_block(course: Course, directory: Path, commands: str, **environment: str) -> str:
    """Run a block of a page in a directory, against the cluster."""
    course.via.client()
    say(f"$ {commands.strip()}")
    script = f"cd {directory} && {commands}"
    host = {"DOCKER_HOST": course.via.socket}
    return call("bash", "-e", "-o", "pipefail", "-c", script, within_s=900, **host, **environment)


def main() -> None:
    kind, suite, place, release = sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    options = "" if (release / "SHA256SUMS.asc").exists() else "--allow-unsigned"
    say(f"{kind} machines of {suite}")
    with up(kind, place) as machines, served(release) as address:
        course = Course(machines, place, 1 if kind == "bare" else 10)
        took = 0.0 if os.environ.get("INSTALLED") else install_everywhere(course, address, options)
        if kind == "bare":
            make_cluster(course, 1)
            newcomer(course, address, options)
            assert took <= INSTALLED_S, f"the installation took {took:.0f} s, not within {INSTALLED_S:.0f} s"
        else:
            make_cluster(course, 3)
            talks(course)
            encrypted(course)
            faults(course)
    say("the course ended well")


if __name__ == "__main__":
    main()
