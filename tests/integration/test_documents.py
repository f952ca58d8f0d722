"""Every command of the documents, run as it is written."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.harness.documents import PAGES, ROOT, shell_blocks
from tests.support.machines.playground_rig import (
    SKEP,
    TestCluster,
    TestNode,
    container_pids,
    create,
    wait_running,
    wait_until,
)
from tests.support.machines.webhook_receiver import a_receiver

pytestmark = pytest.mark.timeout(240)

RUN_ELSEWHERE = {
    ("README.md", 0): "tests/integration/test_demo.py; `make test` is what runs this test",
    ("docs/guide/access.md", 0): "tests/integration/daemon/test_users.py",
    ("docs/guide/access.md", 1): "tests/integration/daemon/test_users.py",
    **{
        ("docs/guide/front-door.md", block): "tests/integration/test_front_door.py"
        for block in (0, 1, 2, 4, 5)
    },
    ("docs/guide/front-door.md", 3): "tests/integration/test_front_door_under_load.py",
    ("docs/guide/front-door.md", 6): "tests/integration/networks/test_failover_addresses.py",
    ("docs/guide/catalog.md", 0): "tests/integration/networks/test_catalog.py",
    ("docs/guide/nat.md", 0): "tests/integration/networks/test_nat.py",
    ("docs/guide/nat.md", 2): "tests/integration/networks/test_nat.py",
    ("docs/guide/nat.md", 1): "tests/integration/networks/test_nat.py",
    ("docs/guide/quotas.md", 0): "tests/integration/daemon/test_users.py",
    ("docs/guide/security.md", 0): "tests/integration/test_mapped_users.py",
    ("bench/README.md", 0): "`make bench`; its results are kept",
    **{
        ("bench/README.md", block): "run by hand before a release; its results are kept"
        for block in range(1, 10)
    },
}
"""Blocks of documents (page, number on the page) that other tests run, and which."""

TUTORIALS = ("docs/guide/start.md", "docs/tutorials/", "docs/cookbook/")
"""Beginnings of pages of which ``test_tutorials.py``, or a test in ``cookbook``, runs every block."""

BACKUP = "docs/guide/backup.md"
RECOVERY = "docs/guide/recovery.md"
KEYS = "docs/guide/keys.md"
NETWORKS = "docs/guide/networks.md"
PORTS = "docs/guide/ports.md"
DOCTOR = "docs/guide/doctor.md"
INSTALL = "docs/guide/install.md"
UPGRADE = "docs/guide/upgrade.md"
STATUS = "docs/guide/status.md"
NOTIFICATIONS = "docs/guide/notifications.md"
EXEC = "docs/guide/exec.md"
NODES = "docs/guide/nodes.md"
PLACEMENT = "docs/guide/placement.md"
PRIORITIES = "docs/guide/priorities.md"
MIGRATE = "docs/guide/migrate.md"
IMAGES = "docs/guide/images.md"
SECRETS = "docs/guide/secrets.md"
VOLUMES = "docs/guide/volumes.md"
CSI = "docs/guide/csi.md"
DEVICES = "docs/guide/devices.md"
PROCESSES = "docs/guide/processes.md"
STACKS = "docs/guide/stacks.md"
UPDATES = "docs/guide/updates.md"
LOGS = "docs/guide/logs.md"
API_ACCESS = "docs/guide/api-access.md"
HISTORY = "docs/guide/history.md"
WHAT_IF = "docs/guide/what-if.md"
VERIFY = "docs/guide/verify.md"
REBALANCE = "docs/guide/rebalance.md"
TROUBLESHOOTING = "docs/guide/troubleshooting.md"
CHECKLIST = "docs/guide/checklist.md"

SYSTEMCTL = """
start() {
    command=$(sed -n "s,^ExecStart=/usr/local,$ROOT/usr/local,p" "$ROOT/etc/systemd/system/skep.service")
    $command --cgroup-parent "$CGROUP" >>"$ROOT/log" 2>&1 &
    echo $! >"$ROOT/pid"
    until [ -S /run/skep/skep.sock ]; do kill -0 $!; sleep 0.1; done
}
case "$1" in
    daemon-reload) test -f "$ROOT/etc/systemd/system/skep.service" ;;
    enable) start ;;
    restart) kill "$(cat "$ROOT/pid")"; while kill -0 "$(cat "$ROOT/pid")" 2>/dev/null; do sleep 0.1; done; start ;;
    *) exit 1 ;;
esac
"""
"""``systemctl`` for the unit below ``$ROOT``, in bash: there is no systemd in a namespace."""

MACHINE = ("unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
"""Namespaces of its own; whatever runs in them ends with them."""


@pytest.fixture
def checkout() -> Iterator[Path]:
    """A directory like a checkout whose set-up was done: ``.venv/bin/skep`` is there, other names for all it makes."""
    with tempfile.TemporaryDirectory(prefix="skep-test-", dir="/var/tmp") as directory:
        (Path(directory) / ".venv/bin").mkdir(parents=True)
        yield Path(directory)


def a_skep(checkout: Path, script: str) -> None:
    """What ``.venv/bin/skep`` runs."""
    command = checkout / ".venv/bin/skep"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)


def run(block: str, checkout: Path, *within: str, **environment: str) -> str:
    """Run a block line by line in bash, the next one only if the one before worked; gives what it printed."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [*within, "bash", "-e", "-o", "pipefail", "-c", block],
        cwd=checkout,
        env={"PATH": path, "HOME": str(checkout), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_no_block_is_forgotten() -> None:
    blocks = {
        (str(page.relative_to(ROOT)), number)
        for page in PAGES
        if not str(page.relative_to(ROOT)).startswith(TUTORIALS)
        for number, _ in enumerate(shell_blocks(str(page.relative_to(ROOT))))
    }
    run_here = {
        *(("README.md", number) for number in range(1, 3)),
        *((page, 0) for page in (TROUBLESHOOTING, CHECKLIST, "docs/tour.md")),
        *((BACKUP, number) for number in range(2)),
        (RECOVERY, 0),
        *((KEYS, number) for number in range(2)),
        *((NETWORKS, number) for number in range(4)),
        (PORTS, 0),
        *((DOCTOR, number) for number in range(3)),
        *((INSTALL, number) for number in range(2)),
        *((UPGRADE, number) for number in range(2)),
        *((STATUS, number) for number in range(3)),
        *((NOTIFICATIONS, number) for number in range(2)),
        *((NODES, number) for number in range(4)),
        *((VOLUMES, number) for number in range(2)),
        (CSI, 0),
        *((IMAGES, number) for number in range(2)),
        *((PLACEMENT, number) for number in range(3)),
        *((page, 0) for page in (EXEC, PRIORITIES, SECRETS, DEVICES, PROCESSES, UPDATES)),
        *((STACKS, number) for number in range(6)),
        (LOGS, 0),
        *((WHAT_IF, number) for number in range(3)),
        (VERIFY, 0),
        *((REBALANCE, number) for number in range(4)),
        *((HISTORY, number) for number in range(2)),
        *((API_ACCESS, number) for number in range(2)),
        *((MIGRATE, number) for number in range(2)),
    }
    assert blocks - set(RUN_ELSEWHERE) == run_here


def test_the_readmes_real_machine(checkout: Path) -> None:
    """A machine of its own for the daemon: network, ``/run`` and ``/var/lib``.  The daemon leaves the terminal free."""
    a_skep(
        checkout,
        f"""
        {SKEP} "$@" --cgroup-parent skep-readme{os.getpid()} >{checkout}/log 2>&1 &
        until [ -S /run/skep/skep.sock ]; do kill -0 $!; sleep 0.1; done
        """,
    )
    printed = run(shell_blocks("README.md")[1] + "docker node ls", checkout, *a_machine(checkout))
    assert "Swarm initialized: current node" in printed
    assert "Leader" in printed


def test_the_readmes_first_step_from_docker_swarm(m1: TestNode, checkout: Path) -> None:
    create(m1, "web", 1)
    run(shell_blocks("README.md")[2], checkout, DOCKER_HOST=m1.socket)
    assert "web" in "".join(path.read_text() for path in (checkout / "moved").rglob("*.y*ml"))


def test_the_page_of_symptoms(m1: TestNode, checkout: Path) -> None:
    (block,) = shell_blocks(TROUBLESHOOTING)
    assert "no problems found" in run(block, checkout, DOCKER_HOST=m1.socket)


def test_the_production_checklist(m1: TestNode, checkout: Path) -> None:
    (block,) = shell_blocks(CHECKLIST)
    assert "m1 Ready Leader" in run(block, checkout, DOCKER_HOST=m1.socket)
    assert (checkout / "swarm.backup").stat().st_size > 1000


def a_machine(checkout: Path) -> tuple[str, ...]:
    """What runs a command in a machine of its own: with a network, an empty ``/run`` and ``/var/lib`` on this disk."""
    (checkout / "lib").mkdir()
    prepared = f"""
        set -e
        mount -t tmpfs run /run
        mount --bind {checkout}/lib /var/lib
        ip link set lo up
        ip link add wan type veth peer name cable; ip addr add 192.0.2.1/24 dev wan; ip link set wan up
        exec "$@"
    """
    return *MACHINE, "sh", "-c", prepared, "sh"


def test_the_guides_to_installing_and_upgrading(checkout: Path) -> None:
    """On a machine of its own, files below another root.  The daemon is what the installed unit starts."""
    root, commands = checkout / "root", checkout / "bin"
    commands.mkdir()
    for name, script in (
        ("systemctl", SYSTEMCTL),
        (
            "make",
            f'exec {shutil.which("make")} --no-print-directory -o setup-run -C {ROOT} DESTDIR={root} "$@"',
        ),
    ):
        (commands / name).write_text(f"#!/bin/bash -e\n{script}\n")
        (commands / name).chmod(0o755)
    script = "\n".join(
        (f"PATH={commands}:$PATH", *shell_blocks(INSTALL), *shell_blocks(UPGRADE), "docker info")
    )
    where = {"ROOT": str(root), "CGROUP": f"skep-install{os.getpid()}"}
    printed = run(script, checkout, *a_machine(checkout), **where)
    assert "docker swarm join --token SWMTKN-1-" in printed
    assert "true Ready" in printed
    assert (root / "usr/local/share/man/man1/skep.1").read_text().startswith('.\\" Written')


def test_the_guide_to_status(m1: TestNode, checkout: Path) -> None:
    health, why, private = shell_blocks(STATUS)
    where = {"DOCKER_HOST": m1.socket}
    assert "m1" in run(health, checkout, **where)
    assert "scheduling constraints not satisfied on 1 node" in run(why, checkout, **where)
    wait_running(m1, "report", 1)
    run(private, checkout, **where)


def test_the_guide_to_notifications(m1: TestNode, checkout: Path, tmp_path: Path) -> None:
    """The page's receiver does not exist, so the target is one on this node."""
    add, choose = shell_blocks(NOTIFICATIONS)
    where, url = {"DOCKER_HOST": m1.socket}, "https://hooks.example.org/skep"
    with a_receiver(m1, tmp_path / "received"):
        here = add.replace(url, "http://127.0.0.1:8080/ --allow-internal")
        assert "http://127.0.0.1:8080" in run(here, checkout, **where)
    assert run(choose, checkout, **where).split() == ["disks", "shop", "disks", "shop"]
    run("skep notify rm ops", checkout, **where)


def test_the_guide_to_commands_in_containers(m1: TestNode, checkout: Path) -> None:
    (block,) = shell_blocks(EXEC)
    assert "select 1\n" in run(block, checkout, DOCKER_HOST=m1.socket)


def test_the_guide_to_priorities(m1: TestNode, checkout: Path) -> None:
    (block,) = shell_blocks(PRIORITIES)
    assert "checkout: " in run(block, checkout, DOCKER_HOST=m1.socket)


def test_the_guide_to_placement(m1: TestNode, checkout: Path) -> None:
    constraints, affinity, reserve = shell_blocks(PLACEMENT)
    run(constraints, checkout, DOCKER_HOST=m1.socket)
    wait_running(m1, "report", 1)
    run(affinity, checkout, DOCKER_HOST=m1.socket)
    wait_running(m1, "cache", 1)
    wait_running(m1, "batch", 1)
    run(reserve, checkout, DOCKER_HOST=m1.socket)


def test_the_guide_to_rebalancing(m1: TestNode, checkout: Path) -> None:
    plan, apply, stop, after_return = shell_blocks(REBALANCE)
    create(m1, "report", 1)
    wait_running(m1, "report", 1)
    assert "No moves" in run(plan, checkout, DOCKER_HOST=m1.socket)
    assert "in progress" in run(apply, checkout, DOCKER_HOST=m1.socket)
    run(stop, checkout, DOCKER_HOST=m1.socket)
    printed = run(after_return, checkout, DOCKER_HOST=m1.socket)
    assert "rebalanced 10m later" in printed


def test_the_guide_to_invariants(m1: TestNode, checkout: Path) -> None:
    (check,) = shell_blocks(VERIFY)
    create(m1, "report", 1)
    wait_running(m1, "report", 1)
    assert "No invariant is violated" in run(check, checkout, DOCKER_HOST=m1.socket)


def test_the_guide_to_what_would_follow(m1: TestNode, checkout: Path) -> None:
    nodes, services, survival = shell_blocks(WHAT_IF)
    create(m1, "report", 1)
    wait_running(m1, "report", 1)
    printed = run(nodes, checkout, DOCKER_HOST=m1.socket)
    assert "0 of the 1 managers that a quorum needs are left" in printed
    assert "report" in printed
    printed = run(services, checkout, DOCKER_HOST=m1.socket)
    assert "What if web has 5 tasks" in printed
    assert "shop_api" in printed
    printed = run(survival, checkout, DOCKER_HOST=m1.socket)
    assert "no quorum is left, so nothing is replaced" in printed


def test_the_guide_to_nodes(m1: TestNode, checkout: Path) -> None:
    drain, budget, forgotten, grace = shell_blocks(NODES)
    where = {"DOCKER_HOST": m1.socket}
    create(m1, "report", 1)
    wait_running(m1, "report", 1)
    run(drain, checkout, **where)
    wait_running(m1, "report", 1)
    run(budget, checkout, **where)
    wait_running(m1, "shop", 3)
    assert run(forgotten, checkout, **where) == "24h\n24h\nnever\n"
    assert run(grace, checkout, **where).split("\n")[:2] == ["10s", "10s"]


def test_the_guide_to_images(own_cluster: TestCluster, checkout: Path) -> None:
    m1, where = own_cluster.node("m1"), {"DOCKER_HOST": own_cluster.node("m1").socket}
    build, share = shell_blocks(IMAGES)
    run(build, checkout, **where)
    run(share, checkout, **where)
    assert in_task(m1, "greeter", "cat", "/greeting") == "hello\n"


def test_the_guide_to_secrets(own_cluster: TestCluster, checkout: Path) -> None:
    m1 = own_cluster.node("m1")
    (block,) = shell_blocks(SECRETS)
    run(block, checkout, DOCKER_HOST=m1.socket)
    assert in_task(m1, "reader", "cat", "/run/secrets/password") == "two"


def test_the_guide_to_devices(own_cluster: TestCluster, checkout: Path) -> None:
    m1 = own_cluster.node("m1")
    (block,) = shell_blocks(DEVICES)
    run(block, checkout, DOCKER_HOST=m1.socket)
    assert in_task(m1, "clock", "head", "-c", "1", "/dev/zero") == "\0"
    assert "16384" in in_task(m1, "clock", "df", "-k", "/dev/shm")


def test_the_guide_to_processes(own_cluster: TestCluster, checkout: Path) -> None:
    m1 = own_cluster.node("m1")
    (block,) = shell_blocks(PROCESSES)
    assert "could not be accessed on a registry" not in run(
        f"{{ {block} }} 2>&1", checkout, DOCKER_HOST=m1.socket
    )
    wait_running(m1, "files", 1)
    assert in_task(m1, "files", "id", "-u") == "65534\n"
    script = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8088').status)"
    assert in_task(m1, "files", "python3", "-c", script) == "200\n"


def test_the_guide_to_volumes(own_cluster: TestCluster, checkout: Path) -> None:
    m1, where = own_cluster.node("m1"), {"DOCKER_HOST": own_cluster.node("m1").socket}
    volume, slots = shell_blocks(VOLUMES)
    (cluster,) = shell_blocks(CSI)
    assert '"type": "tmpfs"' in run(volume, checkout, **where)
    assert "db: " in run(slots, checkout, **where)
    assert "10240" in in_task(m1, "worker", "df", "-k", "/scratch")
    if "--type" not in m1.docker("volume", "create", "--help").stdout:
        pytest.skip("this docker command has no volumes of the cluster")
    assert '"State": "to be created by its driver"' in run(cluster, checkout, **where)
    wait_until(lambda: "orders" not in m1.docker("volume", "ls").stdout, "what no driver made is forgotten")


def test_the_guide_to_stacks(m1: TestNode, checkout: Path) -> None:
    where = {"DOCKER_HOST": m1.socket}
    deploy, change, revert, as_admin, stop, remove = shell_blocks(STACKS)
    assert "+ service shop_migrate" in run(deploy, checkout, **where)
    wait_running(m1, "shop_web", 2)
    assert "ConfigName: shop_site-" in run(change, checkout, **where)
    wait_running(m1, "shop_web", 2)
    assert "ConfigName: shop_site-" in run(revert, checkout, **where)
    wait_running(m1, "shop_web", 2)
    run(as_admin, checkout, **where)
    wait_running(m1, "shop_web", 2)
    run(stop, checkout, **where)
    wait_running(m1, "shop_web", 2)
    run(remove, checkout, **where)
    assert m1.docker("stack", "ls").stdout.count("shop") == 0


def test_the_guide_to_updates(m1: TestNode, checkout: Path) -> None:
    (block,) = shell_blocks(UPDATES)
    m1.docker("service", "create", "--detach", "--name", "web", "busybox:1", "sleep", "600")
    m1.docker("service", "update", "--detach", "--replicas", "2", "web")
    wait_running(m1, "web", 2)
    said = run(block, checkout, DOCKER_HOST=m1.socket).splitlines()
    assert said[2].startswith("2 (now)"), said
    assert "Mode.Replicated.Replicas: 1 -> 2" in said
    wait_running(m1, "web", 1)


def test_the_guide_to_logs(m1: TestNode, checkout: Path) -> None:
    (block,) = shell_blocks(LOGS)
    lines = run(block, checkout, DOCKER_HOST=m1.socket).splitlines()
    assert sum("line " in line and "Z talker." in line for line in lines) >= 2, lines


def test_the_guide_to_history(m1: TestNode, checkout: Path) -> None:
    first, second = shell_blocks(HISTORY)
    environment = {"DOCKER_HOST": m1.socket, "SKEP_HOST": m1.socket}
    run(first, checkout, **environment)
    wait_running(m1, "web", 3)
    assert "web" in run(
        f"{second.splitlines()[0]} || test $? = 3", checkout, **environment
    )  # 3: not as wanted
    run(second.splitlines()[1], checkout, **environment)
    entries = [json.loads(line) for line in (checkout / "web.ndjson").read_text().splitlines()]
    assert "service web updated: replicas 2 → 3" in [one["Message"] for one in entries]


def test_the_guide_to_api_access(m1: TestNode, checkout: Path) -> None:
    mounted, worker_reads = shell_blocks(API_ACCESS)
    where = {"DOCKER_HOST": m1.socket}
    run(mounted, checkout, **where)
    run(worker_reads, checkout, **where)
    run("skep cluster worker-reads off", checkout, **where)


def in_task(node: TestNode, service: str, *command: str) -> str:
    """What a command in the one task of a service prints."""
    (task,) = wait_running(node, service, 1)
    return node.docker("exec", task["Status"]["ContainerStatus"]["ContainerID"], *command).stdout


def test_the_guide_to_migrating(m1: TestNode, checkout: Path) -> None:
    (stack,) = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / MIGRATE).read_text(), re.MULTILINE | re.DOTALL)
    (checkout / "stack.yml").write_text(stack)
    deploy, without_files = shell_blocks(MIGRATE)
    try:
        run(deploy, checkout, DOCKER_HOST=m1.socket)
        wait_running(m1, "shop_web", 2)
        assert "Stack shop is up to date." in run(without_files, checkout, DOCKER_HOST=m1.socket)
        assert "docker secret create password FILE" in (checkout / "moved/MOVING.md").read_text()
    finally:
        m1.docker("stack", "rm", "shop")
        wait_until(
            lambda: m1.docker("secret", "rm", "password", check=False).returncode == 0, "the secret is free"
        )


def test_the_tours_service(m1: TestNode, checkout: Path) -> None:
    printed = run(shell_blocks("docs/tour.md")[0], checkout, DOCKER_HOST=m1.socket)
    assert "converged" in printed
    wait_running(m1, "web", 3)


def test_the_guide_to_networks(own_cluster: TestCluster, checkout: Path) -> None:
    m1, where = own_cluster.node("m1"), {"DOCKER_HOST": own_cluster.node("m1").socket}
    services, attached, encrypted, addresses = shell_blocks(NETWORKS)
    (port,) = shell_blocks(PORTS)
    run(services, checkout, **where)
    wait_running(m1, "api", 3)
    wait_running(m1, "cli", 1)
    run(attached, checkout, **where)
    assert m1.docker("ps", "-aq", "--filter", "name=probe").stdout == ""
    run(port, checkout, **where)
    wait_running(m1, "web", 1)
    assert run(addresses, checkout, **where).split()[-1] == "2"
    run(encrypted, checkout, **where)


def test_the_guide_to_the_doctor(own_cluster: TestCluster, checkout: Path) -> None:
    m1, where = own_cluster.node("m1"), {"DOCKER_HOST": own_cluster.node("m1").socket}
    diagnose, watch, ignore = shell_blocks(DOCTOR)
    printed = run(diagnose, checkout, **where)
    assert "no problems found" in printed
    assert [response["Hostname"] for response in json.loads((checkout / "network.json").read_text())] == [
        "m1"
    ]
    assert run(watch, checkout, **where).startswith("ready")
    run(ignore, checkout, **where)
    (node,) = m1.client().nodes.list()
    assert node.attrs["Spec"]["Labels"] == {"skep.ignore-paths": "true"}


@pytest.mark.slow
def test_the_recovery_guide(own_cluster: TestCluster, checkout: Path) -> None:
    """One manager: locked, backed up, lost, restored, forced.  Its containers keep running while it is locked."""
    m1, where = own_cluster.node("m1"), {"DOCKER_HOST": own_cluster.node("m1").socket}
    backup, restore = shell_blocks(BACKUP)
    lock, unlock = shell_blocks(KEYS)
    (force,) = shell_blocks(RECOVERY)
    create(m1, "web", 2)
    wait_running(m1, "web", 2)
    run(lock, checkout, **where)
    assert (checkout / "unlock-key").read_text().startswith("SWMKEY-1-")
    lock_key = Path(m1.description["state_dir"]) / "manager/keys/lock.key"
    wait_until(lock_key.exists, "the disk is locked")
    before = container_pids(m1, "web")

    os.kill(m1.pids("skep-node")[0], signal.SIGTERM)
    wait_until(lambda: state_of(m1) == "locked", "the node waits for its key")
    assert "needs to be unlocked" in m1.docker("service", "ls", check=False).stderr
    assert all(Path(f"/proc/{pid}").exists() for pid in before.values())
    run(unlock, checkout, **where)
    wait_running(m1, "web", 2)
    assert container_pids(m1, "web") == before

    run(backup, checkout, **where)
    m1.docker("swarm", "leave", "--force")
    printed = run(restore, checkout, **where)
    assert "Swarm restored" in printed
    wait_running(m1, "web", 2, within_s=90)
    kept = container_pids(m1, "web")
    run(force, checkout, **where)
    wait_running(m1, "web", 2)
    assert container_pids(m1, "web") == kept


def state_of(node: TestNode) -> str:
    """``LocalNodeState``; empty while the node does not answer."""
    done = node.docker("info", "--format", "{{.Swarm.LocalNodeState}}", check=False)
    return done.stdout.strip()
