"""``docker run --cgroup-parent``: seen from inside, by its limits, and what is left of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from skep.aio.clock import SystemClock
from skep.engine.confinement.cgroups import Cgroups
from skep.engine.engine import Engine
from skep.errors import InvalidArgument
from skep.model.values.ids import ContainerId
from skep.node.container_apis.peers import container_in
from skep.node.container_apis.server import ContainerApis
from tests.integration.node.conftest import Runner
from tests.integration.node.test_devices import Plain
from tests.support.engine.runc_lab import Lab, remove_cgroups


@pytest.fixture
def plain(engine: Engine, run: Runner) -> Plain:
    return Plain(engine, run)


@pytest.fixture
def elsewhere(lab: Lab) -> Iterator[str]:
    """A group that is not the node's."""
    yield f"{lab.cgroup_parent}-elsewhere"
    remove_cgroups(f"{lab.cgroup_parent}-elsewhere")


def roots(parent: str) -> list[Path]:
    """In each hierarchy where it is there."""
    return [path for root in Cgroups(parent).all_roots() if (path := root / parent).is_dir()]


@pytest.mark.parametrize("is_absolute", [False, True])
async def test_a_container_has_its_group_where_it_was_asked_for(
    plain: Plain, engine: Engine, lab: Lab, elsewhere: str, is_absolute: bool
) -> None:
    given = f"/{elsewhere}//in.slice/" if is_absolute else "in.slice"
    parent = f"{elsewhere if is_absolute else lab.cgroup_parent}/in.slice"
    container = await plain.start("sleep", "100", host={"CgroupParent": given, "CgroupnsMode": "host"})
    assert container.process is not None
    groups = Path(f"/proc/{container.process.pid}/cgroup").read_text().splitlines()
    assert {f"/{parent}/{container.id}"} == {
        path for line in groups if "skep-test" in (path := line.split(":", 2)[2])
    }
    assert (await engine.top(container.id)).processes, "they are found there"
    await engine.remove(container.id, force=True)
    assert roots(parent), "what was made for it stays, as in Docker"
    assert not any(path / container.id in path.iterdir() for path in roots(parent))


async def test_the_limits_of_the_parent_hold(plain: Plain, lab: Lab, elsewhere: str) -> None:
    groups = Cgroups(elsewhere)
    if "pids" not in groups.controllers:
        pytest.skip("the kernel counts no processes in groups")
    parent = groups.parent_directory("pids")
    parent.mkdir()
    (parent / "pids.max").write_text("40")  # runc's own threads are in the group until the command starts
    said = await plain.output("for i in $(seq 50); do sleep 1 & done", CgroupParent=f"/{elsewhere}")
    assert "can't fork" in said


async def test_the_group_of_another_container_is_refused_as_parent(plain: Plain, lab: Lab) -> None:
    other = await plain.start("sleep", "100", host={})
    for given in (f"ctr/{other.id}", f"//{lab.cgroup_parent}/ctr/{other.id}/inner", "monitors", "ctr"):
        with pytest.raises(InvalidArgument, match=r"invalid cgroup parent .*: it belongs to containers"):
            await plain.create("true", host={"CgroupParent": given})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("../up", "it contains . or .."),
        ("/a/../../b", "it contains . or .."),
        ("./here", "it contains . or .."),
        ("a\nb", "not the path of a cgroup"),
        ("a\0b", "not the path of a cgroup"),
        ("x" * 256, "not the path of a cgroup"),
        ("x/" * 2000, "not the path of a cgroup"),
    ],
)
async def test_a_path_that_no_group_can_have_is_refused(plain: Plain, given: str, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        await plain.create("true", host={"CgroupParent": given})


async def test_a_group_that_cannot_be_made_fails_the_start_and_leaves_nothing(
    plain: Plain, engine: Engine, lab: Lab
) -> None:
    """A file of the kernel is where the group should be."""
    container = await plain.create("true", host={"CgroupParent": "/cgroup.procs"})
    with pytest.raises(Exception, match="OCI runtime create failed"):
        await engine.start(container.id)
    await engine.remove(container.id)


async def test_after_a_restart_no_container_is_taken_for_the_machine_until_all_are_found(
    lab: Lab, elsewhere: str
) -> None:
    """Its group does not say that it is a container: the engine has to know, and the API is served before."""
    first = lab.executor()
    async with first.running():
        plain = Plain(first.engine, Runner(lab, first.engine))
        container = await plain.start("sleep", "100", host={"CgroupParent": f"/{elsewhere}"})
        assert container.process is not None
        groups = Path(f"/proc/{container.process.pid}/cgroup").read_text()
    second = lab.executor()
    apis = ContainerApis(SystemClock(), lambda: second.engine)
    docker = ContainerId("0" * 64)
    assert container_in(groups, apis.may_be_ours) == container.id
    async with second.running():
        assert container_in(groups, apis.may_be_ours) == container.id
        assert container_in(f"0::/docker/{docker}\n", apis.may_be_ours) is None
        await second.engine.remove(container.id, force=True)
