"""Bind mounts under crun have the flags that they have under runc."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from skep.engine.runtime.bundle import adapt_to_crun


def adapted(source: Path, *options: str) -> list[str]:
    mount: dict[str, Any] = {"type": "bind", "source": str(source), "options": ["rbind", *options]}
    adapt_to_crun([{"type": "proc", "source": "proc", "options": []}, mount])
    return list(mount["options"][1:])


def test_the_flags_of_the_source_are_kept_unless_the_user_clears_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC | os.ST_RDONLY
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=flags))
    assert adapted(tmp_path, "rprivate") == ["rprivate", "ro", "nosuid", "nodev", "noexec"]
    assert adapted(tmp_path, "exec", "nosuid", "rw") == ["exec", "nosuid", "rw", "nodev"]


def test_only_a_directory_is_recursively_read_only(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "rro" in adapted(tmp_path, "ro", "rro")
    assert "rro" not in adapted(tmp_path / "file", "ro", "rro")
    assert "ro" in adapted(tmp_path / "file", "ro", "rro")


def test_a_missing_source_is_left_to_crun(tmp_path: Path) -> None:
    assert adapted(tmp_path / "none", "ro") == ["ro"]
