"""Mounts of RUN steps: the files that the runtime mounts are the ones that were checked."""

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from skep.engine.build.cache.cache import CacheKey, CacheMounts
from skep.engine.build.dockerfile.mounts import RunMount, parse_mount
from skep.engine.build.inputs import Inputs
from skep.engine.build.runs import Areas, MountSources
from skep.engine.build.stage import MountedTree
from skep.engine.images.store import ImageStore
from skep.errors import InvalidArgument, NotFound
from skep.linux.mounting import bind_part, mount_targets
from skep.linux.syscalls import unmount
from skep.model.container import Mount

pytestmark = pytest.mark.needs("root")


class Step:
    """The mounts of a step that uses the caches of ``place``."""

    def __init__(
        self, place: Path, images: ImageStore, stack: AsyncExitStack, caches: CacheMounts | None = None
    ) -> None:
        self._place = place
        self._areas = 0

        async def opened() -> Path:
            return place / "context"

        @asynccontextmanager
        async def tree_of(_: str) -> AsyncIterator[MountedTree]:
            yield MountedTree(place / "context")

        inputs = Inputs(opened, None, None)
        caches = caches or CacheMounts(place / "caches")
        self._sources = MountSources(stack, Areas(self._area), caches, "", inputs, images, tree_of)

    async def mount(self, *texts: str) -> Mount:
        return (await self._prepared([parse_mount(text, lambda word: word) for text in texts]))[0]

    async def _prepared(self, mounts: Sequence[RunMount]) -> tuple[Mount, ...]:
        await self._sources.find(mounts)
        return (await self._sources.prepare(("true",), "", {}, mounts, "/")).mounts

    def _area(self) -> Path:
        self._areas += 1
        area = self._place / f"area-{self._areas}"
        area.mkdir()
        return area


@pytest.fixture
async def step(tmp_path: Path) -> AsyncIterator[Step]:
    """A step, with an empty context."""
    (tmp_path / "context").mkdir()
    images = ImageStore(tmp_path / "images")
    await images.open()
    async with AsyncExitStack() as stack:
        yield Step(tmp_path, images, stack)
    left = [target for target in mount_targets() if target.startswith(str(tmp_path))]
    assert not left, "the mounts end with the step"


async def test_a_link_in_the_place_of_a_cache_source_does_not_reach_the_host(
    step: Step, tmp_path: Path
) -> None:
    (tmp_path / "host").mkdir()
    (tmp_path / "host/secret").write_text("of the host")
    other = Path((await step.mount("type=cache,id=x,target=/c")).source)
    (other / "d").mkdir()
    (other / "d/file").write_text("of the cache")
    mounted = Path((await step.mount("type=cache,id=x,source=d,target=/d")).source)
    (other / "d").rename(other / "old")
    (other / "d").symlink_to(tmp_path / "host")
    assert os.listdir(mounted) == ["file"]
    (mounted / "new").write_text("new")
    assert (other / "old/new").read_text() == "new"


@pytest.mark.parametrize("sharing", ["locked", "private", "shared"])
async def test_two_mounts_of_one_step_share_their_cache(step: Step, sharing: str) -> None:
    text = f"type=cache,id=x,sharing={sharing}"
    async with asyncio.timeout(60):
        one = await step.mount(f"{text},target=/a", f"{text},target=/b")
        two = await step.mount(f"{text},target=/c")
    assert one.source == two.source


async def test_two_steps_that_lock_two_caches_do_not_wait_for_each_other(tmp_path: Path) -> None:
    images, caches = ImageStore(tmp_path / "images"), CacheMounts(tmp_path / "caches")
    await images.open()
    texts = [f"type=cache,id={id},target=/{id},sharing=locked" for id in "ab"]

    async def run(order: Sequence[str]) -> None:
        async with AsyncExitStack() as stack:
            await Step(tmp_path, images, stack, caches).mount(*order)

    async with asyncio.timeout(60), asyncio.TaskGroup() as group, caches.hold(CacheKey(id="b"), "locked"):
        for order in (texts[::-1], texts):
            group.create_task(run(order))
        for _ in range(10):
            await asyncio.sleep(0)


async def test_a_cache_source_that_leads_out_of_the_cache_is_not_found(step: Step, tmp_path: Path) -> None:
    (tmp_path / "host").mkdir()
    other = Path((await step.mount("type=cache,id=x,target=/c")).source)
    (other / "in").mkdir()
    (other / "absolute").symlink_to("/in")
    (other / "out").symlink_to(tmp_path / "host")
    (other / "up").symlink_to("../../host")
    (other / "loop").symlink_to("loop")
    inside = await step.mount("type=cache,id=x,source=absolute,target=/d")
    assert os.stat(inside.source).st_ino == (other / "in").stat().st_ino
    for name in ("out", "up", "none"):
        with pytest.raises(NotFound, match=f"the cache x has no {name}"):
            await step.mount(f"type=cache,id=x,source={name},target=/d")
    with pytest.raises(InvalidArgument, match="too many links in loop"):
        await step.mount("type=cache,id=x,source=loop,target=/d")


@pytest.mark.parametrize("options", ["", ",rw"])
async def test_a_source_of_a_bind_mount_is_bound_by_what_it_is(
    step: Step, tmp_path: Path, options: str
) -> None:
    context = tmp_path / "context"
    (context / "file").write_text("of the context")
    mounted = await step.mount(f"type=bind,source=file,target=/f{options}")
    (context / "file").unlink()
    (context / "file").symlink_to("/etc/hostname")
    assert Path(mounted.source).is_file()
    assert not Path(mounted.source).is_symlink()
    assert not mounted.source.startswith(str(context))


def test_binding_a_part_of_a_tree_keeps_no_descriptor(tmp_path: Path) -> None:
    (tmp_path / "tree/part").mkdir(parents=True)
    before = len(os.listdir("/proc/self/fd"))
    bind_part(str(tmp_path / "tree"), "part", tmp_path / "target")
    unmount(tmp_path / "target")
    assert len(os.listdir("/proc/self/fd")) == before
