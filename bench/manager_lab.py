"""The production manager process with its etcd, without the rest of a node: no node process, no containers."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.engine import Engine, EngineError
from skep.api.formats.swarm_requests import Endpoints, Founding
from skep.bootstrap import Bootstrap, ManagerConfig, encode
from skep.linux.files import replace_file
from skep.model.node import Availability
from skep.model.swarm import SwarmSpec
from skep.model.values.ids import new_id
from skep.node.cluster.founding import found
from skep.paths import Paths
from skep.security import keypair

HOST = "127.0.0.1"
PORTS = range(20_000, 30_000, 2)
"""Ports of the manager, each followed by etcd's.  They are below the range for outgoing connections."""
READY_S = 60.0
_RUN = "import sys; from pathlib import Path; from {module} import run; from skep.paths import Paths; {call}"


class ManagerLab:
    """One manager.

    Args:
        engine: Its API (the swarm half).
        address: Where nodes reach it.
    """

    def __init__(self, directory: Path, address: str, pid: int) -> None:
        self.paths = _paths(directory)
        self.address = address
        self.pid = pid

    def engine(self) -> Engine:
        """Open a separate connection."""
        return Engine(self.paths.manager_socket)

    @property
    def etcd_pid(self) -> int:
        """Return the pid of its etcd member.  Raises: LookupError."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        for child in map(int, children):
            if Path(f"/proc/{child}/comm").read_text().strip() == "etcd":
                return child
        raise LookupError("etcd does not run")


@contextmanager
def one_manager(
    directory: Path, spec: SwarmSpec, *, module: str = "skep.manager.process"
) -> Iterator[ManagerLab]:
    """Create a cluster in ``directory`` and run its manager.  Its log is ``manager.log`` there.

    Args:
        module: module whose ``run(paths)`` is called.

    Raises: TimeoutError: it does not respond.
    """
    address = _free_address()
    _write_files(_paths(directory), address, spec)
    paths = _paths(directory)
    call = "run(Paths(*map(Path, sys.argv[1:])))"
    with (directory / "manager.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _RUN.format(module=module, call=call), str(paths.data), str(paths.run)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        lab = ManagerLab(directory, address, process.pid)
        _wait_ready(lab, process)
        yield lab
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()  # etcd ends with it
            process.wait()


def _paths(directory: Path) -> Paths:
    return Paths(directory / "data", directory / "run")


def _write_files(paths: Paths, address: str, spec: SwarmSpec) -> None:
    """Write the files that a node process writes for the first manager of a new cluster."""
    endpoints = Endpoints(listen_addr=address, advertise_addr=address, local_addr=HOST)
    bootstrap = Bootstrap(spec=spec)
    plan = Founding(
        endpoints=endpoints,
        spec=spec,
        availability=Availability.ACTIVE,
        default_addr_pool=bootstrap.default_addr_pool,
        subnet_size=bootstrap.subnet_size,
        data_path_port=bootstrap.data_path_port,
        force_new_cluster=False,
    )
    node, pair, root_key_pem = found(plan, new_id)
    for place in (paths.run, paths.manager_keys):
        place.mkdir(mode=0o700, parents=True)
    keypair.save(pair, paths.certificates)
    replace_file(paths.root_ca_key, root_key_pem, mode=0o600)
    config = ManagerConfig(
        data_dir=str(paths.data),
        run_dir=str(paths.run),
        node_id=node.node_id,
        cluster_id=node.cluster_id,
        listen_addr=address,
        advertise_addr=address,
        hostname="manager",
        bootstrap=bootstrap,
    )
    replace_file(paths.manager_config, encode(config), mode=0o600)


def _free_address() -> str:
    """Return an address where neither the manager's port nor the next one is in use.  Raises: LookupError."""
    for port in PORTS:
        try:
            for number in (port, port + 1):
                with socket.socket() as probe:
                    probe.bind((HOST, number))
        except OSError:
            continue
        return f"{HOST}:{port}"
    raise LookupError(f"no two free ports among {PORTS}")


def _wait_ready(lab: ManagerLab, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise TimeoutError(f"the manager ended with {process.returncode}: see its log")
        try:
            lab.engine().get("/swarm")
        except (OSError, EngineError):
            time.sleep(0.05)
            continue
        return
    raise TimeoutError("the manager does not answer")


def resident_mib(pid: int) -> float:
    """Return the resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def processor_s(pid: int) -> float:
    """Return the processor time of a process until now."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
