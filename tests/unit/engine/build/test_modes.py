"""Permissions of ``--chmod``."""

import pytest

from skep.engine.build.dockerfile.modes import parse_mode
from skep.errors import InvalidArgument


@pytest.mark.parametrize(
    ("text", "before", "after"),
    [
        ("755", 0o600, 0o755),
        ("04755", 0, 0o4755),
        ("+x", 0o644, 0o755),
        ("u+x", 0o644, 0o744),
        ("a-x", 0o755, 0o644),
        ("u=rwX,go=rX", 0o640, 0o644),
        ("u=rwX,go=rX", 0o750, 0o755),
        ("=rw,+X", 0o755, 0o777),
        ("g=u", 0o640, 0o660),
        ("g-u", 0o770, 0o700),
        ("go=u-w", 0o755, 0o755),
        ("go=", 0o777, 0o700),
        ("u=,g+r", 0o4755, 0o055),
        ("u+s,g+s", 0o755, 0o6755),
        ("o+s", 0o644, 0o644),
        ("+t", 0o755, 0o1755),
        ("o+t", 0o755, 0o755),
        ("u+rw-x", 0o100, 0o600),
        ("ug+w,o-r", 0o644, 0o660),
        ("=", 0o1777, 0o1000),
    ],
)
def test_symbols_change_permissions_as_chmod_does(text: str, before: int, after: int) -> None:
    assert f"{parse_mode(text).applied(before, is_directory=False):o}" == f"{after:o}"


def test_a_capital_x_counts_for_directories_and_new_ones_have_755() -> None:
    mode = parse_mode("u=rwX,go=rX")
    assert mode.applied(0o600, is_directory=True) == 0o755
    assert mode.of_new_directories == 0o755
    assert parse_mode("1640").of_new_directories == 0o640


@pytest.mark.parametrize(
    "text", ["8", "99", "17777", "7" * 40, "u", "+y", "u=rw,", "x+r", "u+rwz", " 755", "0x7"]
)
def test_what_is_no_mode_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="invalid chmod parameter"):
        parse_mode(text)
