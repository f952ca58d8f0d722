"""Which images are removed when their disk is full."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.engine.images.collecting import AGE_S_MIN, Disk, Marks, UnusedImage, to_collect
from skep.engine.images.digest import Digest

NOW = 1_000_000.0
MARKS = Marks(high=85, low=80)
FULL = Disk(size=1000, used=900)


def an_image(id: str, *, age_s: float = 2 * AGE_S_MIN, layers: str = "", **fields: bool) -> UnusedImage:
    image = UnusedImage(
        id=Digest(id), layers=tuple(layers or id), used_at_s=NOW - age_s, is_needed=False, is_fetched=True
    )
    return msgspec.structs.replace(image, **fields)


def collected(*images: UnusedImage, disk: Disk = FULL, marks: Marks = MARKS, size: int = 50) -> str:
    sizes = dict.fromkeys("abcdefghijklmnopqrstuvwxyz", size)
    return "".join(to_collect(images, sizes, disk, marks, NOW))


def test_the_images_that_were_not_used_for_longest_go_until_the_low_mark() -> None:
    images = [an_image(id, age_s=(10 + number) * AGE_S_MIN) for number, id in enumerate("abcd")]
    assert collected(*images) == "dc"


@pytest.mark.parametrize("disk", [Disk(size=1000, used=849), Disk(size=1000, used=0)], ids=["below", "empty"])
def test_below_the_high_mark_nothing_goes(disk: Disk) -> None:
    assert collected(an_image("a"), disk=disk) == ""


def test_a_high_mark_of_zero_means_never() -> None:
    assert collected(an_image("a"), disk=Disk(size=1000, used=1000), marks=Marks(high=0, low=0)) == ""


def test_a_high_mark_below_the_low_mark_is_the_low_mark_too() -> None:
    images = [an_image(id, age_s=(10 + number) * AGE_S_MIN) for number, id in enumerate("abcd")]
    assert collected(*images, disk=Disk(size=1000, used=780), marks=Marks(high=70, low=80)) == "dc"


@pytest.mark.parametrize(
    "kept",
    [
        pytest.param(an_image("k", is_needed=True), id="of a container, or of a service before its update"),
        pytest.param(an_image("k", is_fetched=False), id="built, loaded or tagged here"),
        pytest.param(an_image("k", age_s=AGE_S_MIN - 1), id="used a moment ago"),
    ],
)
def test_what_may_be_needed_stays(kept: UnusedImage) -> None:
    assert collected(kept, an_image("a"), disk=Disk(size=1000, used=1000)) == "a"


def test_a_layer_counts_with_the_last_image_that_has_it() -> None:
    shared = [an_image(id, age_s=(10 + n) * AGE_S_MIN, layers=f"x{id}") for n, id in enumerate("abc")]
    assert collected(*shared, disk=Disk(size=1000, used=890), size=30) == "cba"
    needed = an_image("n", layers="x", is_needed=True)
    assert collected(needed, an_image("a", layers="x"), an_image("b"), size=100) == "ab"


@given(
    st.lists(
        st.builds(
            UnusedImage,
            id=st.text("0123456789abcdef", min_size=8, max_size=8).map(Digest),
            layers=st.lists(st.sampled_from("abcdef"), unique=True).map(tuple),
            used_at_s=st.floats(0, NOW),
            is_needed=st.booleans(),
            is_fetched=st.booleans(),
        ),
        unique_by=lambda one: one.id,
    ),
    st.integers(0, 1000),
)
def test_what_is_removed_was_not_needed_and_no_more_than_wanted(images: list[UnusedImage], used: int) -> None:
    sizes = dict.fromkeys("abcdef", 50)
    gone = to_collect(images, sizes, Disk(size=1000, used=used), MARKS, NOW)
    by_id = {one.id: one for one in images}
    assert len(set(gone)) == len(gone)
    assert not any(by_id[id].is_needed or not by_id[id].is_fetched for id in gone)
    if gone:
        assert used >= 850
        held = {layer for one in images if one.id not in gone[:-1] for layer in one.layers}
        freed = 50 * len({layer for one in images for layer in one.layers} - held)
        assert used - freed > 800, "without the last one it would not have been enough"
