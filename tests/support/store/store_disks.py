"""The store of a manager on a separate file system."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.machines.playground_rig import TestCluster, TestNode


def store_of(node: TestNode) -> Path:
    """Return the directory of its etcd."""
    return Path(node.description["state_dir"]) / "manager/etcd"


@contextmanager
def mounted(path: Path, *words: str | Path) -> Iterator[None]:
    """Run ``mount WORDS PATH`` for the block."""
    subprocess.run(["mount", *words, path], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


@contextmanager
def store_on_a_disk(cluster: TestCluster, name: str, *words: str | Path) -> Iterator[Path]:
    """Mount a manager's store with ``mount WORDS`` from its next start.  Afterwards the manager is stopped."""
    store = store_of(cluster.node(name))
    kept = store.with_name("kept")
    cluster.skep("kill", name)
    store.rename(kept)
    store.mkdir(mode=0o700)
    with mounted(store, *words):
        try:
            shutil.copytree(kept, store, dirs_exist_ok=True)
            cluster.skep("start", name)
            yield store
        finally:
            cluster.skep("kill", name)
