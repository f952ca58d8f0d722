"""Images on a small disk, deployed again and again."""

import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import pytest

from skep.aio.clock import SystemClock
from skep.engine.images.collecting import AGE_S_MIN, ImageCollector, Marks, disk_of
from skep.engine.images.local import ImageEvent
from skep.engine.images.removal import ImageUser
from skep.errors import SkepError, Unavailable
from tests.support.images.archives import sha256
from tests.support.images.images_rig import ImageCluster, an_image, give

DISK_BYTES = 128 << 20
IMAGE_BYTES = 4 << 20
DEPLOYS = 30


class LaterClock(SystemClock):
    """A clock whose days pass by request."""

    later_s = 0.0

    def now_ns(self) -> int:
        return super().now_ns() + round(self.later_s * 1e9)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(path)), check=True)
    try:
        yield path
    finally:
        subprocess.run(("umount", "-l", str(path)), check=True)


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[ImageCluster]:
    async with ImageCluster(tmp_path / "nodes").running() as running:
        yield running


def name_of(number: int) -> str:
    return f"localhost:1/app:{number}"


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_thirty_deploys_do_not_fill_the_disk_and_a_rollback_finds_its_image(
    cluster: ImageCluster, disk: Path
) -> None:
    events: list[ImageEvent] = []
    clock = LaterClock()
    worker = await cluster.add(root=disk / "images", on_event=events.append)
    containers: list[ImageUser] = []
    specs: list[str] = []

    async def needed(_names: Sequence[str]) -> list[str]:
        return specs

    collector = ImageCollector(worker.images, lambda: containers, needed, clock, lambda: Marks(80, 60))
    for number in range(DEPLOYS):
        made = an_image(IMAGE_BYTES)
        await give(cluster.manager, made, name_of(number))
        image = await worker.images.pull(name_of(number))
        containers[:] = [ImageUser("c", image.id, is_running=True)]
        specs[:] = [name_of(number), name_of(max(number - 1, 0))]
        clock.later_s += 2 * AGE_S_MIN
        await collector.collect()
        found = disk_of(disk)
        assert found.used < 0.85 * found.size, f"after deploy {number}"
    assert worker.images.lookup(name_of(DEPLOYS - 2)) is not None, "a rollback would find it"
    assert worker.images.lookup(name_of(0)) is None
    deleted = [event.id for event in events if event.action == "delete"]
    assert len(deleted) == len(set(deleted))
    assert len(worker.images.images()) + len(deleted) == DEPLOYS


async def test_nothing_is_removed_while_no_manager_says_what_services_need(
    cluster: ImageCluster, disk: Path
) -> None:
    clock = LaterClock()
    worker = await cluster.add(root=disk / "images")
    made = an_image(IMAGE_BYTES)
    await give(cluster.manager, made)
    image = await worker.images.pull("localhost:1/app:1")
    clock.later_s = 2 * AGE_S_MIN
    responses: list[SkepError] = [Unavailable("no manager can be reached now")]

    async def needed(_names: Sequence[str]) -> list[str]:
        if responses:
            raise responses.pop()
        return []

    collector = ImageCollector(worker.images, list, needed, clock, lambda: Marks(1, 0))
    with pytest.raises(Unavailable):
        await collector.collect()
    assert image.id == sha256(made.config)
    assert worker.images.get(image.id)
    assert await collector.collect() == [image.id]
    assert worker.images.images() == ()


async def test_what_a_user_has_loaded_or_tagged_stays(cluster: ImageCluster, disk: Path) -> None:
    clock = LaterClock()
    worker = await cluster.add(root=disk / "images")
    loaded, tagged = an_image(IMAGE_BYTES), an_image(IMAGE_BYTES)
    await give(worker, loaded, "localhost:1/loaded:1")
    await give(cluster.manager, tagged, "localhost:1/tagged:1")
    await worker.images.pull("localhost:1/tagged:1")
    (mine,) = [image for image in worker.images.images() if image.id == sha256(tagged.config)]
    assert worker.images.is_fetched(mine)
    await worker.images.tag("localhost:1/tagged:1", mine.references[0].with_tag("mine"))
    clock.later_s = 2 * AGE_S_MIN

    async def needed(_names: Sequence[str]) -> list[str]:
        return []

    assert await ImageCollector(worker.images, list, needed, clock, lambda: Marks(1, 0)).collect() == []
    assert len(worker.images.images()) == 2


@pytest.mark.parametrize("change", ["tagged", "pulled again", "container created", "removed"])
async def test_an_image_that_changes_after_the_decision_is_judged_again(
    cluster: ImageCluster, disk: Path, change: str
) -> None:
    clock = LaterClock()
    worker = await cluster.add(root=disk / "images")
    images, containers = worker.images, list[ImageUser]()
    content = an_image(IMAGE_BYTES)
    await give(cluster.manager, content, "localhost:1/changed:1")
    await give(cluster.manager, an_image(IMAGE_BYTES), "localhost:1/unused:1")
    changed, unused = [await images.pull(f"localhost:1/{name}:1") for name in ("changed", "unused")]
    clock.later_s = 2 * AGE_S_MIN

    async def needed(_names: Sequence[str]) -> list[str]:
        match change:
            case "tagged":
                await images.tag(changed.id, changed.references[0].with_tag("mine"))
            case "pulled again":
                await images.add(content.config, changed.references, is_fetched=True)
            case "container created":
                containers.append(ImageUser("c", changed.id, is_running=False))
            case _:
                await images.remove(changed.id, force=True, users=list)
        return []

    collector = ImageCollector(images, lambda: containers, needed, clock, lambda: Marks(1, 0))
    assert await collector.collect() == [unused.id]
    left = [] if change == "removed" else [changed.id]
    assert [image.id for image in images.images()] == left
