"""How ``skep ui`` opens a browser."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from skep.cli.see import ui


@pytest.mark.parametrize(
    ("environment", "user", "expected"),
    [
        ({"DISPLAY": ":0"}, 1000, True),
        ({"WAYLAND_DISPLAY": "wayland-0"}, 1000, True),
        ({}, 1000, False),
        ({"DISPLAY": ":0"}, 0, False),
    ],
)
def test_a_browser_is_opened_on_a_screen_and_never_as_root(
    environment: dict[str, str], user: int, expected: bool
) -> None:
    assert ui.has_browser(environment, user) is expected


def test_the_address_is_no_argument_of_the_browser_but_in_a_file_of_its_user() -> None:
    with ui._opened("http://127.0.0.1:1/login/secret") as opening:
        assert "secret" not in opening
        path = Path(unquote(urlsplit(opening).path))
        assert 'url=http://127.0.0.1:1/login/secret"' in path.read_text()
        assert path.parent.stat().st_mode & 0o077 == 0
    assert not path.exists()
