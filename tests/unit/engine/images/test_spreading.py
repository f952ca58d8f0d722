"""Which node an image is fetched from, and which one sends it."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from skep.aio.clock import SystemClock
from skep.engine.images.digest import digest_of
from skep.engine.images.reference import parse_reference
from skep.engine.images.registry.registry import DOCKER_MANIFEST, Document
from skep.engine.images.sharing.serving import (
    COPIES_MAX,
    UPLOADS_MAX,
    UPLOADS_OF_LAYER_MAX,
    UPLOADS_PER_NODE_MAX,
    BlobResponse,
    Load,
    upload_decision,
)
from skep.engine.images.sharing.spreading import (
    ROUNDS_WITHOUT_MAX,
    FetchOutcome,
    ImageSpread,
    SourceRecord,
    SpreadStep,
    after_round,
    in_order,
)
from skep.errors import NotFound, ResourceExhausted, RetryLater, Unavailable

CONTENT = b"{}"
DIGEST = digest_of(CONTENT)
BLOB = b"a layer"
REFERENCE = parse_reference(f"app@{DIGEST}")


class Peer:
    """A node with one manifest and one blob.  ``blob_errors``: what it answers first when asked for the blob."""

    def __init__(
        self,
        name: str,
        *blob_errors: Exception,
        after_s: float = 0.0,
        content: bytes | None = CONTENT,
        is_manager: bool = False,
    ) -> None:
        self.name = name
        self.is_manager = is_manager
        self.asked: list[bool] = []
        """For the blob; true where it was the last resort."""
        self._errors = list(blob_errors)
        self._after_s = after_s
        self._content = content

    async def manifest(self, target: str, bytes_max: int) -> Document:
        await asyncio.sleep(self._after_s)
        if self._content is None:
            raise NotFound(target)
        return Document(self._content, DOCKER_MANIFEST)

    @asynccontextmanager
    async def blob(self, digest: str, *, last_resort: bool) -> AsyncIterator[AsyncIterator[bytes]]:
        self.asked.append(last_resort)
        if self._errors:
            raise self._errors.pop(0)

        async def pieces() -> AsyncIterator[bytes]:
            yield BLOB

        yield pieces()


def a_spread(
    *peers: Peer, text: str = str(REFERENCE), distrusted: dict[str, float] | None = None
) -> ImageSpread:
    async def find() -> Sequence[Peer]:
        return peers

    known = {} if distrusted is None else distrusted
    return ImageSpread(parse_reference(text), find, SystemClock(), random.Random(1).random, known)


async def fetched(spread: ImageSpread) -> bytes:
    async with spread.blob("sha256:blob") as (start, pieces):
        assert start == 0
        return b"".join([piece async for piece in pieces])


async def test_an_image_comes_from_the_node_that_responds_first() -> None:
    far, near = Peer("far", after_s=5.0), Peer("near")
    spread = a_spread(far, near)
    assert (await spread.manifest(DIGEST, 100)).content == CONTENT
    assert await fetched(spread) == BLOB
    assert (len(near.asked), len(far.asked)) == (1, 0)


async def test_of_nodes_that_respond_the_busy_one_is_passed_over() -> None:
    busy, idle = Peer("busy", ResourceExhausted("busy")), Peer("idle", after_s=0.02)
    spread = a_spread(busy, idle)
    await spread.manifest(DIGEST, 100)
    assert await fetched(spread) == BLOB
    assert (busy.asked, idle.asked) == ([False], [False])


async def test_a_node_that_has_it_soon_is_waited_for() -> None:
    busy = Peer("busy", *[ResourceExhausted("busy")] * 2)
    soon = Peer("soon", *[RetryLater("soon", 0.1)] * 2)
    assert await fetched(a_spread(busy, soon)) == BLOB
    assert not any(busy.asked), "another node is about to have it"


async def test_a_busy_node_learns_that_no_other_has_it() -> None:
    busy, without = Peer("busy", ResourceExhausted("busy")), Peer("without", *[NotFound("none")] * 9)
    assert await fetched(a_spread(busy, without)) == BLOB
    assert busy.asked == [False, True]


async def test_a_node_that_does_not_respond_again_and_again_is_no_reason_to_wait() -> None:
    busy = Peer("busy", *[ResourceExhausted("busy")] * 3)
    away = Peer("away", *[Unavailable("away")] * 99)
    assert await fetched(a_spread(busy, away)) == BLOB
    assert busy.asked == [False, False, True, True]


async def test_what_no_node_has_is_not_waited_for_for_long() -> None:
    peers = [Peer("a", *[NotFound("none")] * 9), Peer("b", *[Unavailable("away")] * 9)]
    with pytest.raises(NotFound, match="no node of the cluster has"):
        await fetched(a_spread(*peers))
    assert [len(peer.asked) for peer in peers] == [ROUNDS_WITHOUT_MAX] * 2


async def test_another_manifest_than_its_digest_names_is_not_taken_and_its_node_not_asked_again() -> None:
    liar, honest = Peer("liar", content=b"[]"), Peer("honest", after_s=0.02)
    distrusted: dict[str, float] = {}
    spread = a_spread(liar, honest, distrusted=distrusted)
    assert (await spread.manifest(DIGEST, 100)).content == CONTENT
    await fetched(spread)
    await fetched(a_spread(liar, honest, distrusted=distrusted))
    assert (len(liar.asked), len(honest.asked)) == (0, 2)


async def test_a_node_that_sent_another_blob_is_not_asked_again() -> None:
    first, second = Peer("first"), Peer("second")
    spread = a_spread(first, second)
    await fetched(spread)
    assert spread.mistrust("sha256:blob")
    await fetched(spread)
    assert (len(first.asked), len(second.asked)) == (1, 1)
    assert not spread.mistrust("sha256:another"), "no node has sent it"


async def test_a_name_is_taken_from_managers_and_no_others() -> None:
    worker, manager = Peer("worker"), Peer("manager", is_manager=True, after_s=0.02, content=b"[1]")
    assert (await a_spread(worker, manager, text="app:1").manifest("1", 100)).content == b"[1]"
    with pytest.raises(NotFound):
        await a_spread(worker, text="app:1").manifest("1", 100)


async def test_a_manifest_beyond_the_limit_is_not_taken() -> None:
    with pytest.raises(NotFound):
        await a_spread(Peer("large")).manifest(DIGEST, 1)


def test_the_quickest_come_first_and_those_that_fail_last() -> None:
    records = {
        "slow": SourceRecord(0.5),
        "quick": SourceRecord(0.1),
        "failed": SourceRecord(0.01, failures=1),
    }
    peers = [Peer(name) for name in ("failed", "unknown", "slow", "quick")]
    assert [peer.name for peer in in_order(peers, records)] == ["quick", "slow", "unknown", "failed"]


@pytest.mark.parametrize(
    ("outcomes", "empty_rounds", "step"),
    [
        ([FetchOutcome.BUSY, FetchOutcome.ARRIVING], 0, SpreadStep.WAIT),
        ([FetchOutcome.BUSY, FetchOutcome.ABSENT], 0, SpreadStep.INSIST),
        ([FetchOutcome.BUSY, FetchOutcome.FAILED], 0, SpreadStep.WAIT),
        ([FetchOutcome.ABSENT, FetchOutcome.FAILED], 0, SpreadStep.WAIT),
        ([FetchOutcome.ABSENT], ROUNDS_WITHOUT_MAX - 1, SpreadStep.GIVE_UP),
        ([], ROUNDS_WITHOUT_MAX - 1, SpreadStep.GIVE_UP),
        ([FetchOutcome.ARRIVING], ROUNDS_WITHOUT_MAX, SpreadStep.WAIT),
    ],
)
def test_after_a_round_without_a_blob(
    outcomes: list[FetchOutcome], empty_rounds: int, step: SpreadStep
) -> None:
    assert after_round(outcomes, empty_rounds) is step


@pytest.mark.parametrize(
    ("load", "is_present", "is_arriving", "last_resort", "upload"),
    [
        (Load(), True, False, False, BlobResponse.SENT),
        (Load(), False, True, False, BlobResponse.ARRIVING),
        (Load(), False, False, True, BlobResponse.ABSENT),
        (Load(copies=COPIES_MAX - 1), True, False, False, BlobResponse.SENT),
        (Load(copies=COPIES_MAX), True, False, False, BlobResponse.BUSY),
        (Load(copies=COPIES_MAX), True, False, True, BlobResponse.SENT),
        (Load(of_layer=UPLOADS_OF_LAYER_MAX), True, False, True, BlobResponse.BUSY),
        (Load(uploads=UPLOADS_MAX), True, False, True, BlobResponse.BUSY),
        (Load(of_node=UPLOADS_PER_NODE_MAX), True, False, True, BlobResponse.BUSY),
    ],
)
def test_what_a_node_sends(
    load: Load, is_present: bool, is_arriving: bool, last_resort: bool, upload: BlobResponse
) -> None:
    assert (
        upload_decision(load, is_present=is_present, is_arriving=is_arriving, last_resort=last_resort)
        is upload
    )
