"""The manager process by itself: with what it ends, and what it says."""

import subprocess
import sys
from pathlib import Path

import pytest

from skep.bootstrap import FUTILE, REMOVED, ManagerConfig, encode
from skep.model.node import NodeRole
from skep.model.values.ids import new_id
from skep.paths import Paths
from skep.security import keypair
from tests.support.managers.wire_rig import Cluster

RUN = """
import sys
from pathlib import Path
from skep.manager.process import run
from skep.paths import Paths
run(Paths(*map(Path, sys.argv[1:])))
"""


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    """A manager among others whose etcd ended before it had a log, as when its peers refuse it."""
    paths = Paths(tmp_path / "data", tmp_path / "run")
    cluster = Cluster(heartbeat_s=3)
    node_id = new_id()
    keypair.save(cluster.pair(node_id, NodeRole.MANAGER), paths.certificates)
    database = paths.etcd / "data" / "member" / "snap" / "db"
    database.parent.mkdir(parents=True)
    database.touch()
    paths.run.mkdir()
    config = ManagerConfig(
        data_dir=str(paths.data),
        run_dir=str(paths.run),
        node_id=node_id,
        cluster_id=cluster.id,
        listen_addr="127.0.0.1:0",
        advertise_addr="127.0.0.1:1",
        hostname="m2",
        managers=("127.0.0.1:1",),
    )
    paths.manager_config.write_bytes(encode(config))
    return paths


def ended(paths: Paths) -> tuple[int, str]:
    """Exit code and last words."""
    command = (sys.executable, "-c", RUN, str(paths.data), str(paths.run))
    process = subprocess.run(command, timeout=30, check=False, capture_output=True)
    return process.returncode, paths.last_words("manager").read_text()


def test_a_manager_that_never_came_in_starts_over_with_nothing(paths: Paths) -> None:
    (paths.etcd / "joining").touch()
    code, words = ended(paths)
    assert code == REMOVED
    assert "did not come up among the other managers" in words


def test_a_manager_that_was_in_keeps_what_it_has_and_says_the_way_back(paths: Paths) -> None:
    code, words = ended(paths)
    assert code == FUTILE
    assert "damaged or gone" in words
