from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.engine.images.digest import Digest
from skep.engine.images.reference import Reference, matches, parse_any, parse_reference
from skep.errors import InvalidArgument

DIGEST = "sha256:" + "a" * 64

NAMES = st.from_regex(r"[a-z0-9]{1,8}((\.|_|__|-{1,3})[a-z0-9]{1,4}){0,2}", fullmatch=True)
DOMAINS = st.sampled_from(
    ["", "localhost/", "localhost:5000/", "reg.example/", "10.0.0.1:80/", "[::1]:5000/"]
)
TAGS = st.from_regex(r"(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,10})?", fullmatch=True)


@st.composite
def references(draw: st.DrawFn) -> str:
    path = "/".join(draw(st.lists(NAMES, min_size=1, max_size=3)))
    return draw(DOMAINS) + path + draw(TAGS) + draw(st.sampled_from(["", f"@{DIGEST}"]))


@given(references())
def test_what_is_parsed_prints_as_something_that_means_the_same(text: str):
    reference = parse_reference(text)
    assert parse_reference(str(reference)) == reference
    assert parse_reference(reference.familiar) == reference


@given(st.text(max_size=60))
def test_any_text_is_a_reference_or_refused(text: str):
    with suppress(InvalidArgument):
        parse_any(text)


@pytest.mark.parametrize(
    ("familiar", "normal"),
    [
        ("busybox", "docker.io/library/busybox"),
        ("busybox:1", "docker.io/library/busybox:1"),
        ("team/app", "docker.io/team/app"),
        ("localhost/app", "localhost/app"),
        ("reg:5000/app", "reg:5000/app"),
        (f"reg.example/a/b:1@{DIGEST}", f"reg.example/a/b:1@{DIGEST}"),
    ],
)
def test_a_familiar_name_stands_for_a_normal_one(familiar: str, normal: str):
    reference = parse_reference(familiar)
    assert str(reference) == normal
    assert reference.familiar == familiar


def test_the_old_name_of_docker_hub_is_its_new_one():
    assert parse_reference("index.docker.io/busybox") == parse_reference("docker.io/library/busybox")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "invalid reference format"),
        ("a:", "invalid reference format"),
        ("-a", "invalid reference format"),
        ("a..b", "invalid reference format"),
        ("a b", "invalid reference format"),
        (":1", "invalid reference format"),
        (f"a@{DIGEST}:1", "invalid reference format"),
        ("Busybox", "invalid reference format: repository name must be lowercase"),
        ("team/App:1", "invalid reference format: repository name must be lowercase"),
        ("a" * 64, f"invalid repository name ({'a' * 64}), cannot specify 64-byte hexadecimal strings"),
        ("x/" * 130 + "x", "repository name must not be more than 255 characters"),
        ("a@md5:" + "a" * 32, "unsupported digest algorithm"),
        ("a@sha256:" + "a" * 40, "invalid checksum digest length"),
    ],
)
def test_what_is_no_reference_is_refused_with_dockers_words(text: str, message: str):
    with pytest.raises(InvalidArgument) as refused:
        parse_reference(text)
    assert str(refused.value) == message


def test_a_long_run_of_one_character_is_parsed_at_once():
    parse_reference("a" * 200 + ":1")
    with pytest.raises(InvalidArgument):
        parse_reference("a" * 100_000 + "-")


def test_a_full_id_is_a_digest_and_no_name():
    assert parse_any("a" * 64) == Digest(DIGEST)
    assert parse_any(DIGEST) == Digest(DIGEST)
    assert parse_any("abc") == Reference("docker.io", "library/abc")


def test_latest_stands_where_neither_tag_nor_digest_does():
    assert parse_reference("a").with_default_tag().tag == "latest"
    assert parse_reference("a:1").with_default_tag().tag == "1"
    assert parse_reference(f"a@{DIGEST}").with_default_tag().tag == ""


@pytest.mark.parametrize(
    ("pattern", "selects"),
    [
        ("team/app", True),
        ("team/*", True),
        ("*/*:1.*", True),
        ("te[a-z]m/a?p", True),
        ("*", False),
        ("team/app:2", False),
        ("te[^a]m/app", False),
        ("team/app:1[.]2", True),
        ("team/\\app", True),
    ],
)
def test_a_filter_selects_by_a_pattern_that_stops_at_slashes(pattern: str, selects: bool):
    assert matches(pattern, parse_reference("team/app:1.2")) is selects


@pytest.mark.parametrize("pattern", ["[", "[]", "a\\", "[z-a]"])
def test_a_malformed_pattern_is_refused(pattern: str):
    with pytest.raises(InvalidArgument, match="syntax error in pattern"):
        matches(pattern, parse_reference("a"))


@given(st.text(max_size=30))
def test_no_pattern_breaks_the_matcher(pattern: str):
    with suppress(InvalidArgument):
        matches(pattern, parse_reference("team/app:1.2"))
