"""Images that a node serves to others while its own user works with them."""

import asyncio
import os
from pathlib import Path

import msgspec

from skep.aio.clock import SystemClock
from skep.engine.images.digest import chain_ids, digest_of, hex_of
from skep.engine.images.layers import Layer
from skep.engine.images.reference import parse_reference
from skep.engine.images.sharing.serving import ServedImages
from skep.engine.images.store import ImageStore
from tests.support.images.archives import a_config

PLAIN, COMPRESSED = b"a layer", b"\x1f\x8b\x08 and so on"
(CHAIN_ID,) = chain_ids([digest_of(PLAIN)])


async def test_a_manifest_names_the_layer_that_a_push_has_compressed_meanwhile(tmp_path: Path) -> None:
    """Other nodes would ask for the digest of the former file, which the node does not have any longer."""
    directory = tmp_path / "images/layers" / hex_of(CHAIN_ID)
    (directory / "diff").mkdir(parents=True)
    layer = Layer(chain_id=CHAIN_ID, diff_id=digest_of(PLAIN), size_bytes=1, plain_bytes=len(PLAIN))
    (directory / "layer.json").write_bytes(msgspec.json.encode(layer))
    os.mkfifo(directory / "content")
    store = ImageStore(tmp_path / "images")
    await store.open()
    await store.add(a_config(PLAIN), [parse_reference("app:1")])
    served = ServedImages(store, SystemClock())
    making = asyncio.create_task(served.manifest("app:1"))
    async with asyncio.timeout(60):
        writer = await asyncio.to_thread(os.open, directory / "content", os.O_WRONLY)  # it is being read
        (tmp_path / "new").write_bytes(COMPRESSED)
        (tmp_path / "new").rename(directory / "content")
        blob = digest_of(COMPRESSED)
        store.layer_store.layers[CHAIN_ID] = msgspec.structs.replace(layer, blob=blob)
        os.write(writer, PLAIN)
        os.close(writer)
        document = await making
    (named,) = msgspec.json.decode(document.content)["layers"]
    assert (named["digest"], named["size"]) == (blob, len(COMPRESSED))
    async with served.blob(named["digest"], "n2") as sent:
        assert b"".join([piece async for piece in sent.pieces]) == COMPRESSED
