"""Runs Dockerfiles in the builder itself, without containers, to inspect the resulting image."""

import io
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

from skep.aio.clock import SystemClock
from skep.engine.build.builder import Builder
from skep.engine.build.interface import BuildRequest, Provider
from skep.engine.build.stage import Changes
from skep.engine.images.digest import Digest
from skep.engine.images.store import ImageStore


class BuildRig:
    """A builder with an image store and one context.  Its Dockerfiles start from scratch, and have no RUN."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self.images = ImageStore(place / "images")
        engine: Any = SimpleNamespace(images=self.images)
        self.builder = Builder(engine, place / "builds", SystemClock())
        self.context = place / "context"
        self.context.mkdir()
        self._mounted = 0
        self.progress = MagicMock()

    async def build(
        self,
        dockerfile: str,
        *,
        is_buildkit: bool = True,
        provider: Provider | None = None,
        arguments: Mapping[str, str] | None = None,
    ) -> Digest:
        """Build a Dockerfile, and return the image's id.  Raises: SkepError."""
        await self.images.open()

        async def open_context() -> Path:
            return self.context

        self.progress.reset_mock()
        request = BuildRequest(dockerfile=dockerfile, is_buildkit=is_buildkit, arguments=arguments or {})
        return (await self.builder.build(request, open_context, self.progress, provider)).image_id

    @contextmanager
    def files(self, image_id: Digest) -> Iterator[Path]:
        """Extract the file system of an image while the block runs."""
        self._mounted += 1
        area = self._place / f"mounted-{self._mounted}"
        area.mkdir()
        with Changes(area, self.images.layers(self.images.get(image_id))).mounted() as root:
            yield root

    async def tree(self, dockerfile: str, **options: Any) -> Sequence[str]:
        """Build a Dockerfile, and return the sorted files and empty directories of the image."""
        with self.files(await self.build(dockerfile, **options)) as root:
            return listed(root)

    @property
    def cached(self) -> int:
        """Return how many steps of the last build came from the cache."""
        return int(self.progress.cached.call_count)


def listed(root: Path) -> Sequence[str]:
    """Return the sorted paths below ``root``, without directories that are not empty."""
    return [
        str(path.relative_to(root))
        for path in sorted(root.rglob("*"))
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir())
    ]


def fill(root: Path, files: Mapping[str, str]) -> None:
    """Write files.  A name with a slash at its end is a directory, and a content ``-> x`` is a link to x."""
    for name, content in files.items():
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if content.startswith("-> "):
            path.symlink_to(content.removeprefix("-> "))
        else:
            path.write_text(content)


def a_tar(files: Mapping[str, str], mode: str = "w") -> bytes:
    """Return an archive whose files belong to 7:8."""
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            about = tarfile.TarInfo(name.rstrip("/"))
            about.uid, about.gid = 7, 8
            if name.endswith("/"):
                about.type, about.mode = tarfile.DIRTYPE, 0o750
                tar.addfile(about)
            else:
                about.size = len(content)
                tar.addfile(about, io.BytesIO(content.encode()))
    return output.getvalue()
