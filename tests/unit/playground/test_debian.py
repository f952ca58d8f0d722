"""Which packages bring a program's libraries."""

from skep.playground.images.debian import libraries_named

SHOWN = """\
nginx
  Depends: libc6
 |Depends: libpcre2-8-0
  Depends: <libssl3>
    libssl3t64
  Depends: zlib1g
  Depends: iproute2
  Recommends: libfoo1
"""


def test_libraries_are_direct_dependencies_alternatives_and_providers() -> None:
    assert libraries_named(SHOWN) == {"libc6", "libpcre2-8-0", "libssl3t64", "zlib1g"}
