"""Facts about user namespaces, on which the marks of overlayfs depend."""

from pathlib import Path

import pytest

from skep.linux.own_user_namespace import is_in_user_namespace, is_overlay_mark


def test_a_root_of_a_user_namespace_is_not_the_machines(tmp_path: Path) -> None:
    (tmp_path / "whole").write_text("         0          0 4294967295\n")
    (tmp_path / "part").write_text("         0     100000      65536\n")
    assert not is_in_user_namespace(tmp_path / "whole")
    assert is_in_user_namespace(tmp_path / "part")


@pytest.mark.parametrize("prefix", ["trusted.overlay.", "user.overlay."])
@pytest.mark.parametrize("name", ["redirect", "opaque", "metacopy", "overlay.opaque"])
def test_marks_of_either_kind_are_overlayfs_own(prefix: str, name: str) -> None:
    assert is_overlay_mark(prefix + name)


@pytest.mark.parametrize("name", ["user.note", "user.overlays", "security.capability", "trusted.other"])
def test_other_attributes_belong_to_the_file(name: str) -> None:
    assert not is_overlay_mark(name)
