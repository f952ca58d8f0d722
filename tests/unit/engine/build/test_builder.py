"""A build beside the other work of its process."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from skep.aio.clock import SystemClock
from skep.engine.build.builder import Builder
from skep.engine.build.config import expanded
from skep.engine.build.interface import BuildRequest
from skep.engine.images.store import ImageStore


async def test_variables_are_substituted_outside_of_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = set[int]()

    def noted(*arguments: Any) -> Any:
        threads.add(threading.get_ident())
        return expanded(*arguments)

    monkeypatch.setattr("skep.engine.build.builder.expanded", noted)
    images = ImageStore(tmp_path / "images")
    await images.open()
    engine: Any = SimpleNamespace(images=images)
    request = BuildRequest(dockerfile="FROM scratch\nENV A=aaaa\nENV B=${A//a/b}\n")

    async def no_context() -> Path:
        raise AssertionError("no step needs a file")

    built = await Builder(engine, tmp_path / "builds", SystemClock()).build(request, no_context, MagicMock())
    env = images.get(built.image_id).config.defaults.env or ()
    assert env[1:] == ("A=aaaa", "B=bbbb")
    assert threads
    assert threading.get_ident() not in threads
