"""Playgrounds for integration tests: real runc, real etcd, nodes in namespaces of their own."""

from collections.abc import Generator, Iterator

import pytest

from tests.support.harness import last_logs as last_words
from tests.support.machines.playground_rig import (
    TestCluster,
    TestNode,
    a_playground,
    remove_services,
    wait_until,
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the last log lines of the nodes to a failure."""
    report = yield
    if report.failed:
        report.sections += [
            (f"what {name} said last", words) for name, words in last_words.reported() if words
        ]
    return report


@pytest.fixture(scope="session")
def cluster() -> Iterator[TestCluster]:
    """One playground with a single manager, shared by all tests that clean up after themselves."""
    with a_playground("shared") as playground:
        yield playground


@pytest.fixture
def own_cluster() -> Iterator[TestCluster]:
    """A playground for one test that breaks things."""
    with a_playground("own") as playground:
        yield playground


@pytest.fixture
def m1(cluster: TestCluster) -> Iterator[TestNode]:
    """The manager of the shared playground, without services and networks before and after."""
    node = cluster.node("m1")
    yield node
    remove_services(node)
    api = node.client().api
    wait_until(lambda: not api.tasks() and not api.containers(all=True), "everything of the test is removed")
    api.prune_networks()


@pytest.fixture
def own_m1(own_cluster: TestCluster) -> TestNode:
    """The manager of a playground of the test's own."""
    return own_cluster.node("m1")
