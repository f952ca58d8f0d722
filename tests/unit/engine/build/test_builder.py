"""A build beside the other work of its process."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

from skep.aio.clock import SystemClock
from skep.engine.build.builder import Builder
from skep.engine.build.dockerfile.config import expanded
from skep.engine.build.interface import BuildRequest
from skep.engine.images.store import ImageStore
from tests.support.managers.counted_calls import calls_of


async def test_variables_are_substituted_outside_of_the_event_loop(tmp_path: Path) -> None:
    images = ImageStore(tmp_path / "images")
    await images.open()
    engine: Any = SimpleNamespace(images=images)
    request = BuildRequest(dockerfile="FROM scratch\nENV A=aaaa\nENV B=${A//a/b}\n")

    async def no_context() -> Path:
        raise AssertionError("no step needs a file")

    builder = Builder(engine, tmp_path / "builds", SystemClock())
    with calls_of(expanded) as here:
        built = await builder.build(request, no_context, MagicMock())
    env = images.get(built.image_id).config.defaults.env or ()
    assert env[1:] == ("A=aaaa", "B=bbbb")
    assert "ENV B=${A//a/b}" not in [call["instruction"].text for call in here.of(expanded)]
