"""What is known of a long list is kept, and only that."""

from msgspec import Struct

from skep.api.http.responses import KnownJson


class Thing(Struct):
    id: str
    size: int = 0


class Shown(list[str]):
    """Shows a thing as it is, and remembers which had to be."""

    def __call__(self, circumstances: object, thing: Thing) -> Thing:
        self.append(thing.id)
        return thing


def test_an_object_is_shown_once_until_another_one_takes_its_place() -> None:
    known, show, one = KnownJson(), Shown(), Thing("a")
    assert known.of("a", one, None, show) == known.of("a", one, None, show) == b'{"id":"a","size":0}'
    assert show == ["a"]
    assert known.of("a", Thing("a", 2), None, show) == b'{"id":"a","size":2}'
    assert known.of("a", one, None, show) == b'{"id":"a","size":0}'


def test_what_is_not_listed_any_more_is_forgotten() -> None:
    known, show, things = KnownJson(), Shown(), [Thing(id) for id in "abc"]
    for thing in things:
        known.of(thing.id, thing, None, show)
    known.keep_only(["a", "c"])
    show.clear()
    for thing in things:
        known.of(thing.id, thing, None, show)
    assert show == ["b"]


def test_in_other_circumstances_everything_is_shown_again() -> None:
    known, show, thing = KnownJson(), Shown(), Thing("a")
    before, later = known.agreed({"a": "frozen"}), known.agreed({"a": "frozen"})
    known.of("a", thing, before, show)
    known.of("a", thing, later, show)
    assert show == ["a"]
    other = known.agreed({"a": ""})
    known.of("a", thing, other, show)
    assert show == ["a", "a"]


def test_a_slow_list_caches_nothing_for_requests_with_other_parameters() -> None:
    known, thing = KnownJson(), Thing("a")
    slow = known.agreed({"a": "frozen"})
    now = known.agreed({"a": ""})
    assert known.of("a", thing, slow, lambda why, _: why) == b'{"a":"frozen"}'
    assert known.of("a", thing, now, lambda why, _: why) == b'{"a":""}'
