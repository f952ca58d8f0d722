from msgspec.structs import replace

from skep.engine.images.digest import Digest
from skep.engine.images.image import ContainerDefaults, Image, ImageConfig
from skep.engine.images.listing import ImageFilter, prunable, select
from skep.engine.images.reference import parse_reference

DIGEST = "sha256:" + "d" * 64


def an_image(*names: str, id: str = "a", created: str = "2026-01-01T00:00:00Z", **fields: str) -> Image:
    return Image(
        id=Digest("sha256:" + id * 64),
        config=ImageConfig(created=created, config=ContainerDefaults(labels=fields or None)),
        references=tuple(parse_reference(name) for name in names),
    )


OLD = an_image("web:1", id="1", created="2026-01-01T00:00:00Z", tier="front")
NEW = an_image("web:2", "shop:1", id="2", created="2026-03-01T00:00:00+01:00", tier="back")
BARE = an_image(id="3", created="2026-02-01T00:00:00Z")
ALL = (OLD, NEW, BARE)


def ids(requested: ImageFilter) -> list[Image]:
    return [listed.image for listed in select(ALL, requested)]


def test_images_are_listed_the_newest_first():
    assert ids(ImageFilter()) == [NEW, BARE, OLD]


def test_dangling_images_are_those_without_a_name():
    assert ids(ImageFilter(dangling=True)) == [BARE]
    assert ids(ImageFilter(dangling=False)) == [NEW, OLD]


def test_labels_select_by_name_and_by_value():
    assert ids(ImageFilter(labels=("tier",))) == [NEW, OLD]
    assert ids(ImageFilter(labels=("tier=front",))) == [OLD]
    assert ids(ImageFilter(without_labels=("tier=front",))) == [NEW, BARE]
    assert ids(ImageFilter(without_labels=("tier", "tier=front"))) == [NEW, BARE], "as in Docker: all of them"


def test_before_and_since_compare_when_images_were_made():
    assert ids(ImageFilter(before=BARE)) == [OLD]
    assert ids(ImageFilter(since=BARE)) == [NEW]


def test_a_reference_filter_shows_only_the_names_that_fit():
    (listed,) = select(ALL, ImageFilter(patterns=("shop",)))
    assert listed.references == (parse_reference("shop:1"),)


def test_an_unnamed_image_with_children_is_a_step_and_listed_only_with_all():
    step = an_image(id="4")
    child = Image(id=Digest("sha256:" + "5" * 64), config=ImageConfig(), parent=step.id)
    assert [listed.image for listed in select([step, child], ImageFilter())] == [child]
    assert len(select([step, child], ImageFilter(all=True))) == 2


def test_a_stage_of_buildkit_is_listed_with_a_name_or_with_all_only():
    stage, named = replace(an_image(id="4"), is_step=True), replace(OLD, is_step=True)
    assert [listed.image for listed in select([stage, named, BARE], ImageFilter())] == [BARE, named]
    assert [listed.image for listed in select([stage, BARE], ImageFilter(dangling=True))] == [BARE]
    assert len(select([stage, named, BARE], ImageFilter(all=True))) == 3
    assert prunable(ImageFilter())(stage)


def test_pruning_removes_untagged_images_unless_all_are_requested():
    pulled = an_image(f"web@{DIGEST}", id="6")
    assert prunable(ImageFilter())(BARE)
    assert prunable(ImageFilter())(pulled)
    assert not prunable(ImageFilter())(OLD)
    assert prunable(ImageFilter(dangling=False))(OLD)
    assert not prunable(ImageFilter(dangling=False, until_ns=0))(OLD)


def test_an_image_with_an_invalid_creation_time_is_listed_as_the_oldest():
    odd = an_image("odd:1", id="7", created="yesterday")
    assert [listed.image for listed in select([odd, OLD], ImageFilter())] == [OLD, odd]
