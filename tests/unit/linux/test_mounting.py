"""Mount options, as the kernel takes them apart."""

from pathlib import Path

import pytest

from skep.linux.mounting import KernelMountFailed, _split, _with_opened_layers


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a=1,b=2", ["a=1", "b=2"]),
        (r"a\,b,c", [r"a\,b", "c"]),
        (r"a\\,b", [r"a\\", "b"]),
        ("", [""]),
        ("a,", ["a", ""]),
        ("a\\", ["a\\"]),
    ],
)
def test_a_backslash_hides_the_next_character_and_a_hidden_one_hides_none(
    text: str, words: list[str]
) -> None:
    assert _split(text, ",") == words


def test_no_layer_is_hidden_behind_another_option(tmp_path: Path) -> None:
    with pytest.raises(KernelMountFailed, match="has sockets of this node"):
        _with_opened_layers(rf"context=x\\,lowerdir={tmp_path}", [str(tmp_path)])
