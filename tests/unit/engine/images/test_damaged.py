"""Images of which something cannot be read any more: their layers stay, and their neighbors work."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

from skep.engine.images.digest import Digest, chain_ids, digest_of, hex_of
from skep.engine.images.layers import Layer
from skep.engine.images.reference import parse_reference
from skep.engine.images.removal import Conflict, ImageUser
from skep.engine.images.store import ImageStore
from skep.errors import NotFound
from tests.support.images.archives import a_config

BASE, APP, OTHER = b"base", b"app", b"other"
DAMAGED, NEIGHBOR = a_config(BASE, APP), a_config(BASE, OTHER)


def chain_of(*layers: bytes) -> tuple[Digest, ...]:
    return chain_ids(digest_of(layer) for layer in layers)


CHAINS = {*chain_of(BASE, APP), *chain_of(BASE, OTHER)}


class Reports(list[str]):
    """What the store has reported, the newest last."""

    def __call__(self, message: str) -> None:
        self.append(message)


async def opened(root: Path, reports: Reports) -> ImageStore:
    """As a node process opens it: what is there is read, and what nothing needs is deleted."""
    store = ImageStore(root, report=reports)
    await store.open()
    await store.settle()
    return store


def layers_on_disk(root: Path) -> set[str]:
    return {f"sha256:{path.name}" for path in (root / "layers").iterdir()}


@pytest.fixture
async def root(tmp_path: Path) -> Path:
    """A store with two images on a common layer."""
    images = {"damaged:1": (DAMAGED, BASE, APP), "neighbor:1": (NEIGHBOR, BASE, OTHER)}
    for name, (config, *layers) in images.items():
        for chain_id, content in zip(chain_of(*layers), layers, strict=True):
            directory = tmp_path / "layers" / hex_of(chain_id)
            (directory / "diff").mkdir(parents=True, exist_ok=True)
            layer = Layer(chain_id=chain_id, diff_id=digest_of(content), size_bytes=1, plain_bytes=1)
            (directory / "layer.json").write_bytes(msgspec.json.encode(layer))
        store = ImageStore(tmp_path)
        await store.open()
        await store.add(config, [parse_reference(name)])
    assert layers_on_disk(tmp_path) == CHAINS
    return tmp_path


def flip(content: bytes) -> bytes:
    return content.replace(b"linux", b"linuX")


def cut(content: bytes) -> bytes:
    return content[:40]


def empty(_content: bytes) -> bytes:
    return b""


def damage(root: Path, how: Callable[[bytes], bytes]) -> None:
    file = root / "configs" / hex_of(digest_of(DAMAGED))
    assert how(file.read_bytes()) != file.read_bytes()
    file.write_bytes(how(file.read_bytes()))


@pytest.mark.parametrize("how", [flip, cut, empty])
async def test_a_damaged_configuration_does_not_make_its_layers_look_unused(
    root: Path, how: Callable[[bytes], bytes]
) -> None:
    damage(root, how)
    with capture_logs() as logs:
        reports = Reports()
        store = await opened(root, reports)
        await store.settle()
    assert layers_on_disk(root) == CHAINS
    assert [one["image"] for one in logs if one["event"] == "image is damaged"] == [digest_of(DAMAGED)]
    assert digest_of(DAMAGED)[:19] in reports[-1]
    with pytest.raises(NotFound):
        store.get("damaged:1")


async def test_the_neighbors_of_a_damaged_image_come_and_go(root: Path) -> None:
    damage(root, cut)
    store = await opened(root, Reports())
    assert store.layers(store.get("neighbor:1"))
    await store.tag("neighbor:1", parse_reference("further:1"))
    await store.remove(digest_of(NEIGHBOR), force=True, users=list)
    assert store.images() == ()
    assert layers_on_disk(root) == CHAINS, "it is not known which of them the damaged image has"


async def test_a_damaged_image_that_comes_again_is_whole(root: Path) -> None:
    damage(root, cut)
    reports = Reports()
    store = await opened(root, reports)
    await store.remove("neighbor:1", users=list)
    await store.add(DAMAGED)
    assert reports[-1] == ""
    assert store.get("damaged:1").id == digest_of(DAMAGED)
    assert layers_on_disk(root) == {*chain_of(BASE, APP)}, "those of its neighbor are deleted now"


@pytest.mark.parametrize("word", [digest_of(DAMAGED), hex_of(digest_of(DAMAGED))[:12], "damaged:1"])
async def test_a_damaged_image_is_removed_by_id_or_name(root: Path, word: str) -> None:
    damage(root, flip)
    reports = Reports()
    store = await opened(root, reports)
    await store.remove(word, users=list)
    assert reports[-1] == ""
    assert layers_on_disk(root) == {*chain_of(BASE, OTHER)}
    assert [one.id for one in (await opened(root, Reports())).images()] == [digest_of(NEIGHBOR)]


async def test_a_damaged_image_is_not_removed_while_a_container_runs(root: Path) -> None:
    damage(root, cut)
    store = await opened(root, Reports())
    users: list[ImageUser] = []
    for is_running in (True, False):
        users[:] = [ImageUser("c1", digest_of(DAMAGED), is_running)]
        with pytest.raises(Conflict):
            await store.remove("damaged:1", users=lambda: users)
    await store.remove("damaged:1", force=True, users=lambda: users)
    assert layers_on_disk(root) == CHAINS, "the container stands on them"
    await store.sweep(list)
    assert layers_on_disk(root) == {*chain_of(BASE, OTHER)}


async def test_an_image_that_lacks_a_layer_keeps_the_others(root: Path) -> None:
    (root / "layers" / hex_of(chain_of(BASE, APP)[0]) / "layer.json").write_bytes(b"{")
    reports = Reports()
    store = await opened(root, reports)
    assert layers_on_disk(root) == CHAINS
    assert "2 images" in reports[-1], "both stand on it"
    await store.remove("neighbor:1", users=list)
    assert layers_on_disk(root) == {*chain_of(BASE, APP)}
