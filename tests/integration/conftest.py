"""Playgrounds for integration tests: real runc, real etcd, nodes in namespaces of their own."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.cluster import TestCluster, TestNode, wait_until


@pytest.fixture(scope="session")
def cluster() -> Iterator[TestCluster]:
    """One playground with a single manager, shared by all tests that clean up after themselves."""
    yield from _playground("shared")


@pytest.fixture
def own_cluster() -> Iterator[TestCluster]:
    """A playground for one test that breaks things."""
    yield from _playground("own")


def _playground(name: str) -> Iterator[TestCluster]:
    directory = Path(tempfile.mkdtemp(prefix="skep-test-", dir="/var/tmp"))
    cluster = TestCluster(directory, f"{name}{os.getpid()}")
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def m1(cluster: TestCluster) -> Iterator[TestNode]:
    """The manager of the shared playground, without services before and after."""
    node = cluster.node("m1")
    yield node
    api = node.client().api
    for service in api.services():
        api.remove_service(service["ID"])
    wait_until(lambda: not api.tasks() and not api.containers(all=True), "everything of the test is removed")


@pytest.fixture
def own_m1(own_cluster: TestCluster) -> TestNode:
    """The manager of a playground of the test's own."""
    return own_cluster.node("m1")
