"""No user and no password of an address is in a text that a build shows or stores."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.engine.build.addresses import (
    ambiguity,
    check_address,
    parts_of,
    redacted,
    redacted_address,
    shown_errors,
)
from skep.errors import InvalidArgument, NotFound

X = "xxxxx:xxxxx@"
D = f"@sha256:{'0123456789abcdef' * 4}"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:password@host.tld/path.git", f"https://{X}host.tld/path.git"),
        ("https://user@h/", "https://xxxxx@h/"),
        ("https://:password@h/", "https://:xxxxx@h/"),
        ("ssh://git:p@h/r HTTPS://u:p@h", f"ssh://{X}h/r HTTPS://{X}h"),
        # Characters that end a host or a word.
        ("https://u:pa/ss@h/x", f"https://{X}h/x"),
        ("https://u:p@ss@h/x", f"https://{X}h/x"),
        ("https://u:p@ss/word@h/x", f"https://{X}h/x"),
        ("https://u:p?a#b@h/x", f"https://{X}h/x"),
        ("https://u:/x@h https://u:123456/x@h", f"https://{X}h https://{X}h"),
        (
            "https://u:ab://cd@h https://u:12://cd@h https://u:://x@h",
            f"https://{X}h https://{X}h https://{X}h",
        ),
        (r"curl https://u:p\ w@h/x", f"curl https://{X}h/x"),
        # Quotes around an address, and in it.
        ("ADD [\"https://u:p@h/x\", '/']", f"ADD [\"https://{X}h/x\", '/']"),
        ("curl 'https://u:p\"w@h/x' https://u:it's@h/x", f"curl 'https://{X}h/x' https://{X}h/x"),
        ('RUN curl "https://u:p w@h/x" && mail "me@x"', f'RUN curl "https://{X}h/x" && mail "me@x"'),
        (r'ADD ["https://u:p\"w@h/x", "/"]', rf'ADD ["https://{X}h/x", "/"]'),
        # Several addresses in one word.
        ('ADD ["https://u:p@h/x","https://v:q@i/y","/d"]', f'ADD ["https://{X}h/x","https://{X}i/y","/d"]'),
        ("--mirrors=https://u:p@h/x,https://v:q@i/y", f"--mirrors=https://{X}h/x,https://{X}i/y"),
        ("|1 URL=https://u:p@h /bin/sh -c git clone $URL", f"|1 URL=https://{X}h /bin/sh -c git clone $URL"),
        # Text around the scheme.
        ("${S}://u:p@h -uhttps://u:p@h 1https://u:p@h", f"${{S}}://{X}h -uhttps://{X}h 1https://{X}h"),
        # Addresses without a user.
        ("https://h:80/a@b http://[::1]:80/a@b", "https://h:80/a@b http://[::1]:80/a@b"),
        ("https://registry:443/@scope/pkg", "https://registry:443/@scope/pkg"),
        ('"https://h:80","a@b" https://h. me@x', '"https://xxxxx:xxxxx@b" https://h. me@x'),
        ("https://h:$PORT/ me@x git@h:o/r.git", "https://h:$PORT/ me@x git@h:o/r.git"),
        # Digests of images, and passwords that look like a part of one.
        (f"docker-image://app:1{D} docker-image://h:5000/a:1.2{D}",) * 2,
        (
            f'["docker-image://app:1{D}", "docker-image://u:p@h/a{D}"]',
            f'["docker-image://app:1{D}", "docker-image://{X}h/a{D}"]',
        ),
        (f"https://u:p{D}@h/x https://u:p{D}.h/x", f"https://{X}h/x https://{X}{D[1:]}.h/x"),
        ("https://u:p@sha256:1234/x", f"https://{X}sha256:1234/x"),
        ("", ""),
    ],
)
def test_how_addresses_are_shown(text: str, shown: str) -> None:
    assert redacted(text) == shown


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://u:p w@h/x", f"https://{X}h/x"),
        ("u:p@h/r.git", f"{X}h/r.git"),
        ("https:/u:p@h", f"{X}h"),
        ("git@h:o/r.git", "git@h:o/r.git"),
        ("github.com/o/r", "github.com/o/r"),
        ("h:80/x", "h:80/x"),
        ("https://h:80/a@b", "https://h:80/a@b"),
        (f"h:5000/app{D}",) * 2,
        (f"h:5000{D}",) * 2,
        (f"app:1{D}",) * 2,
        (f"h:5000/app:1{D},other:2,app{D}",) * 2,
        (f"u:p@h/app:1{D}", f"{X}h/app:1{D}"),
        (f"app:1{D},u:p@h/app", f"{X}h/app"),
        (f"u:p{D}x@h/app", f"{X}h/app"),
        (f"u:p{D[:-1]}", f"{X}{D[1:-1]}"),
    ],
)
def test_how_a_text_that_is_an_address_is_shown(address: str, shown: str) -> None:
    assert redacted_address(address) == shown


secrets = st.text(st.characters(exclude_categories=("Cs", "Z", "Cc")), min_size=1, max_size=12).filter(
    lambda text: not any(one.isspace() for one in text)
)
passwords = secrets.map(lambda text: f"Z{text}Q")
"""A letter on both sides, so that digits before a slash are not a port, and the secret is not in another part."""
hosts = st.sampled_from(["host.example", "10.0.0.1", "[::1]", "host:8080", "localhost"])
paths = st.sampled_from(["", "/", "/repo.git", "/a/b?c=d#e", "/r.git#main:docs"])
addresses = st.builds(
    lambda scheme, user, password, host, path: (f"{scheme}://{user}:{password}@{host}{path}", password),
    st.sampled_from(["http", "https", "git", "ssh", "HTTPS"]),
    st.sampled_from(["", "ann", "ann%40x", "$USER"]),
    passwords,
    hosts,
    paths,
)


@given(
    st.lists(addresses, min_size=1, max_size=3),
    st.sampled_from(
        ["{}", '"{}"', "'{}'", '["{}", "/d"]', "--url={}", "({})", "URL='{}'", "fatal: '{}/': no"]
    ),
    st.sampled_from([" ", '" "', "\n", "\t"]),
)
def test_no_password_is_left_in_a_text(found: list[tuple[str, str]], around: str, between: str) -> None:
    shown = redacted(between.join(around.format(address) for address, _ in found))
    assert not any(password in shown for _, password in found)
    for _, password in found:
        left = [part for part in (password[:4], password[-4:]) if len(part) == 4 and part in shown]
        assert not left


@given(addresses)
def test_no_part_of_a_password_is_left_in_an_address(found: tuple[str, str]) -> None:
    address, password = found
    shown = redacted_address(address)
    assert "Z" not in shown
    assert "Q" not in shown
    assert redacted(address) == shown
    assert redacted(shown) == shown
    assert password not in str(parts_of(address).rest) or ambiguity(address) or _is_refused(address)


def _is_refused(address: str) -> bool:
    try:
        check_address(address)
    except InvalidArgument as error:
        return "Z" not in str(error)
    return False


@given(st.text(max_size=40), st.text(max_size=40))
def test_any_text_can_be_shown(one: str, two: str) -> None:
    shown = redacted(f"{one}://{two}")
    assert shown.startswith(one)
    assert len(shown) <= len(one + two) + len("://" + X) * (f"{one}://{two}".count("://"))


@pytest.mark.parametrize(
    "text",
    [
        "a://b:c,",
        "a",
        '"a://b ',
        "\"a://b,'",
        "a://u:p@h,",
        "://",
        "a:",
        D,
        f"a://b:c{D}",
        "\\ ",
        '"://"',
        "@://:",
    ],
)
def test_a_long_line_costs_time_in_proportion(text: str) -> None:
    """A Dockerfile may be hostile.  Work in the square of the length would take minutes."""
    begun = time.process_time()
    redacted(text * 100_000)
    assert time.process_time() - begun < 20


def test_an_address_whose_password_ends_the_host_is_refused() -> None:
    with pytest.raises(InvalidArgument) as failure:
        check_address("https://u:pa/ss@h/x")
    assert str(failure.value) == (
        "invalid address: https://xxxxx:xxxxx@h/x: write / ? # and @ in a user or password as %2F %3F %23 and %40"
    )
    for address in ("https://u:p@h/x", "https://h/a@b", "https://h:80/@s/p", "git@h:o/r", "u:p/x@h"):
        check_address(address)


def test_errors_keep_their_kind() -> None:
    with pytest.raises(NotFound, match=r"^no https://xxxxx:xxxxx@h$"), shown_errors():
        raise NotFound("no https://u:p@h")
