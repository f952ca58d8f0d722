"""Helpers for tests of the etcd process and of the store on it."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from skep.aio.clock import SystemClock
from skep.errors import AlreadyExists
from skep.linux.processes import parsed_stat, start_ticks_of
from skep.model.secret import Secret, SecretSpec
from skep.model.swarm import Swarm
from skep.model.values.ids import ClusterId, NodeId, SecretId
from skep.store.etcd.encryption.cipher import new_wrapping_key
from skep.store.etcd.initialize import initialize
from skep.store.etcd.process.binary import Binary
from skep.store.etcd.process.flags import MemberSettings
from skep.store.etcd.process.member import EtcdMember
from skep.store.etcd.store import EtcdStore, open_store
from skep.store.interface import Transaction
from tests.support.store.etcd_rig import a_member

CLOCK = SystemClock()
KEY = new_wrapping_key()
NODE = NodeId("m1")


def found(tx: Transaction) -> None:
    tx.put(Swarm(id=ClusterId("cluster")))


def a_secret(name: str) -> Secret:
    return Secret(id=SecretId(name), spec=SecretSpec(name=name))


def put_secret(tx: Transaction, name: str) -> Secret:
    return tx.put(a_secret(name))


@asynccontextmanager
async def a_new_cluster(settings: MemberSettings) -> AsyncIterator[tuple[EtcdMember, EtcdStore]]:
    """Run a member with a new cluster in it, and its store."""
    async with a_member(settings).running() as member:
        with suppress(AlreadyExists):
            await initialize(settings.socket, KEY, CLOCK, found)
        async with open_store(settings.socket, NODE, KEY, CLOCK) as store:
            yield member, store


def pid_of(member: EtcdMember) -> int:
    pid = member.pid
    assert pid is not None
    return pid


async def freeze(pid: int) -> None:
    """Stop a process with SIGSTOP, and return when every thread has stopped.  The signal alone stops them one after
    another.
    """
    os.kill(pid, signal.SIGSTOP)
    tasks = Path(f"/proc/{pid}/task")
    await until(
        lambda: all(parsed_stat((task / "stat").read_bytes()).state == "T" for task in tasks.iterdir())
    )


async def until(holds: Callable[[], object]) -> None:
    """Return when ``holds()`` is true.  The test's own deadline limits the wait."""
    while not holds():  # noqa: ASYNC110 - processes announce nothing
        await asyncio.sleep(0.005)


async def wait_ended(pid: int) -> None:
    await until(lambda: not start_ticks_of(pid))


def a_fake_etcd(path: Path, script: str) -> Binary:
    """Write a program that stands for etcd and reports a supported version."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return Binary(path, (3, 5, 30))
