import pytest

from skep.engine.images.digest import Digest
from skep.engine.images.image import Image, ImageConfig
from skep.engine.images.reference import parse_reference
from skep.engine.images.removal import Conflict, ImageUser, Removal, ancestors_to_prune, removal

DIGEST = "sha256:" + "d" * 64


def an_image(*names: str, id: str = "a", parent: str = "") -> Image:
    return Image(
        id=Digest("sha256:" + id * 64),
        config=ImageConfig(),
        references=tuple(sorted(parse_reference(name) for name in names)),
        parent=parent,
    )


def a_user(image: Image, *, is_running: bool = True) -> ImageUser:
    return ImageUser("c" * 64, image.id, is_running)


def take(word: str, image: Image, *, force: bool = False, users: tuple[ImageUser, ...] = ()) -> Removal:
    return removal(word, image, force=force, users=users, children=())


def test_a_name_that_is_not_the_last_is_only_untagged():
    image = an_image("web:1", "web:2")
    assert take("web:1", image) == Removal((parse_reference("web:1"),))


def test_the_last_name_takes_the_image_with_it():
    image = an_image("web:1")
    assert take("web:1", image) == Removal((parse_reference("web:1"),), image.id)


def test_the_last_tag_of_a_repository_takes_its_digests_along():
    image = an_image("web:1", f"web@{DIGEST}")
    decided = take("web:1", image)
    assert decided == Removal((parse_reference("web:1"), parse_reference(f"web@{DIGEST}")), image.id)


def test_an_id_removes_all_names_of_one_repository():
    image = an_image("web:1", f"web@{DIGEST}")
    assert take(image.id[7:19], image) == Removal(image.references, image.id)


def test_an_id_with_names_in_several_repositories_must_be_forced():
    image = an_image("web:1", "shop:1")
    with pytest.raises(Conflict, match=r"\(must be forced\) - image is referenced in multiple repositories"):
        take(image.id, image)
    assert take(image.id, image, force=True) == Removal(image.references, image.id)


def test_the_only_name_of_a_used_image_must_be_forced():
    image = an_image("web:1")
    with pytest.raises(Conflict) as refused:
        take("web:1", image, users=(a_user(image),))
    assert str(refused.value) == (
        'conflict: unable to remove repository reference "web:1" (must force) - container cccccccccccc is'
        " using its referenced image aaaaaaaaaaaa"
    )


def test_forcing_untags_what_a_running_container_uses_and_keeps_the_image():
    image = an_image("web:1")
    assert take("web:1", image, force=True, users=(a_user(image),)) == Removal((parse_reference("web:1"),))


def test_an_image_of_a_running_container_cannot_go_by_its_id_even_with_force():
    image = an_image("web:1")
    with pytest.raises(Conflict) as refused:
        take(image.id, image, force=True, users=(a_user(image),))
    assert str(refused.value) == (
        "conflict: unable to delete aaaaaaaaaaaa (cannot be forced) - image is being used by running"
        " container cccccccccccc"
    )


def test_an_image_of_a_stopped_container_is_removed_by_its_id_with_force():
    image = an_image("web:1")
    stopped = (a_user(image, is_running=False),)
    with pytest.raises(Conflict, match="image is being used by stopped container"):
        take(image.id, image, users=stopped)
    assert take(image.id, image, force=True, users=stopped) == Removal(image.references, image.id)


def test_an_image_with_children_cannot_go_by_its_id():
    image = an_image()
    child = an_image("web:1", id="b", parent=image.id)
    with pytest.raises(Conflict, match="image has dependent child images"):
        removal(image.id, image, force=True, users=(), children=[child])


def test_parents_that_nothing_needs_go_along_up_to_the_first_that_is_needed():
    root = an_image("base:1", id="1")
    middle = an_image(id="2", parent=root.id)
    top = an_image("web:1", id="3", parent=middle.id)
    assert ancestors_to_prune(top, [root, middle, top], ()) == [middle]
    assert ancestors_to_prune(top, [root, middle, top], (a_user(middle),)) == []
