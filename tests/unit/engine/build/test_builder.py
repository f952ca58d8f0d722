"""A build beside the other work of its process."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from skep.aio.clock import SystemClock
from skep.engine.build.builder import Builder
from skep.engine.build.dockerfile.config import expanded
from skep.engine.build.dockerfile.instructions import Instruction
from skep.engine.build.interface import BuildRequest
from skep.engine.images.store import ImageStore


async def test_variables_are_substituted_outside_of_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = dict[str, int]()

    def noted(instruction: Instruction, *arguments: Any) -> Any:
        threads[instruction.text] = threading.get_ident()
        return expanded(instruction, *arguments)

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
    assert set(threads) == {"ENV A=aaaa", "ENV B=${A//a/b}"}
    assert threads["ENV B=${A//a/b}"] != threading.get_ident()
