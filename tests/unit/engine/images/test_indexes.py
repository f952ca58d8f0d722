"""Names with images for several platforms, in the store of a node."""

from pathlib import Path

import msgspec
import pytest

from skep.engine.images.digest import Digest, chain_ids, digest_of, hex_of
from skep.engine.images.layers import Layer
from skep.engine.images.reference import parse_reference
from skep.engine.images.removal import ImageUser
from skep.engine.images.store import ImageStore
from skep.errors import NotFound
from tests.support.images.archives import a_config

LAYER = b"a layer"
CONFIGS = [a_config(LAYER, architecture=name) for name in ("amd64", "arm64")]
AMD64, ARM64 = map(digest_of, CONFIGS)
(CHAIN_ID,) = chain_ids([digest_of(LAYER)])
APP = parse_reference("app:1").with_default_tag()


@pytest.fixture
async def store(tmp_path: Path) -> ImageStore:
    """It has an image for two platforms."""
    directory = tmp_path / "images/layers" / hex_of(CHAIN_ID)
    (directory / "diff").mkdir(parents=True)
    layer = Layer(chain_id=CHAIN_ID, diff_id=digest_of(LAYER), size_bytes=1, plain_bytes=1)
    (directory / "layer.json").write_bytes(msgspec.json.encode(layer))
    store = ImageStore(tmp_path / "images")
    await store.open()
    for config in CONFIGS:
        await store.add(config)
    await store.name_index([AMD64, ARM64], [APP], AMD64)
    return store


def ids(store: ImageStore, name: str = "app:1") -> list[Digest]:
    return [image.id for image in store.named(name)]


async def test_a_name_means_one_image_and_knows_the_others_after_a_restart(
    store: ImageStore, tmp_path: Path
) -> None:
    again = ImageStore(tmp_path / "images")
    await again.open()
    for one in (store, again):
        assert one.get("app:1").id == AMD64
        assert ids(one) == [AMD64, ARM64]
        assert [image.id for image in one.images() if image.is_member] == [ARM64]


async def test_a_further_tag_has_the_index_and_a_moved_one_does_not(store: ImageStore) -> None:
    await store.tag("app:1", parse_reference("app:2"))
    await store.tag(ARM64, APP)
    assert ids(store, "app:2") == [AMD64, ARM64]
    assert ids(store) == [ARM64]
    assert not store.get(ARM64).is_member


async def test_no_image_of_an_index_is_pruned_before_its_name(store: ImageStore) -> None:
    removed, _ = await store.prune(lambda image: not image.tags, users=tuple)
    assert removed.deleted == ()
    removed, _ = await store.prune(lambda image: bool(image.tags), users=tuple)
    assert {AMD64, ARM64} <= set(removed.deleted)
    assert store.images() == ()


async def test_an_image_that_a_container_uses_stays_when_its_name_is_removed(store: ImageStore) -> None:
    users = [ImageUser("c" * 64, ARM64, is_running=True)]
    removed = await store.remove("app:1", users=lambda: users)
    assert AMD64 in removed.deleted
    assert [image.id for image in store.images()] == [ARM64]


async def test_an_index_of_an_image_that_is_gone_is_not_named(store: ImageStore) -> None:
    gone = digest_of(b"gone")
    with pytest.raises(NotFound, match=f"No such image: {gone}"):
        await store.name_index([AMD64, gone], [parse_reference("app:3").with_default_tag()], AMD64)
    assert store.lookup("app:3") is None


async def test_a_damaged_image_of_an_index_does_not_stop_other_work_with_images(
    store: ImageStore, tmp_path: Path
) -> None:
    other = await store.add(a_config(LAYER, architecture="riscv64"), [parse_reference("other:1")])
    (tmp_path / "images/configs" / hex_of(ARM64)).write_text("cut")
    again = ImageStore(tmp_path / "images")
    await again.open()
    assert ids(again) == [AMD64]
    removed = await again.remove("other:1", users=tuple)
    assert other.id in removed.deleted
    with pytest.raises(NotFound, match=f"No such image: {ARM64}"):
        await again.push(APP, "")
    removed = await again.remove("app:1", users=tuple)
    assert AMD64 in removed.deleted
