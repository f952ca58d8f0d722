"""Bind mounts under crun have the flags that they have under runc."""

import os
from pathlib import Path
from typing import Any

from skep.engine.runtime.bind_flags import adapt_to_crun


def adapted(source: Path, *options: str, **given: Any) -> list[str]:
    mount: dict[str, Any] = {"type": "bind", "source": str(source), "options": ["rbind", *options]}
    adapt_to_crun([{"type": "proc", "source": "proc", "options": []}, mount], **given)
    return list(mount["options"][1:])


def test_the_flags_of_the_source_are_kept_unless_the_user_clears_them(tmp_path: Path) -> None:
    found = {str(tmp_path): os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC | os.ST_RDONLY}
    kept = adapted(tmp_path, "rprivate", flags_at=found.__getitem__)
    assert kept == ["rprivate", "ro", "nosuid", "nodev", "noexec"]
    cleared = adapted(tmp_path, "exec", "nosuid", "rw", flags_at=found.__getitem__)
    assert cleared == ["exec", "nosuid", "rw", "nodev"]


def test_the_flags_are_those_of_the_mount_that_has_the_source() -> None:
    flags = os.statvfs("/proc").f_flag
    named = {"ro": os.ST_RDONLY, "nosuid": os.ST_NOSUID, "nodev": os.ST_NODEV, "noexec": os.ST_NOEXEC}
    assert adapted(Path("/proc")) == [name for name, flag in named.items() if flags & flag]


def test_only_a_directory_is_recursively_read_only(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "rro" in adapted(tmp_path, "ro", "rro")
    assert "rro" not in adapted(tmp_path / "file", "ro", "rro")
    assert "ro" in adapted(tmp_path / "file", "ro", "rro")


def test_a_missing_source_is_left_to_crun(tmp_path: Path) -> None:
    assert adapted(tmp_path / "none", "ro") == ["ro"]
