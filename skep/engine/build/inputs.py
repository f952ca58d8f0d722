"""Inputs that a build gets from its client: directories, and registry credentials."""

from pathlib import Path

from skep.engine.build.dockerfile.targets import context_name
from skep.engine.build.files.context import KnownContext
from skep.engine.build.interface import BuildRequest, OpenContext, Provider


class Inputs:
    """Inputs of one build from its client."""

    def __init__(self, context: OpenContext, provider: Provider | None, known: KnownContext | None) -> None:
        self._open = context
        self.known = known
        self._directory: Path | None = None
        self._further: dict[str, Path] = {}
        self.provider = provider

    async def context(self) -> Path:
        """Return the directory of the context."""
        if self._directory is None:
            self._directory = await self._open()
        return self._directory

    async def open_named(self, request: BuildRequest, name: str) -> Path | None:
        """Return the directory of a named context, or None if there is none with this name."""
        name = context_name(name)
        if name not in self._further:
            if name not in request.directories:
                return None
            self._further[name] = await request.directories[name]()
        return self._further[name]

    async def credentials(self, request: BuildRequest, domain: str) -> str:
        """Return the ``X-Registry-Auth`` value for a registry, from the request or the client."""
        auth = request.credentials.get(domain, "")
        return auth if auth or self.provider is None else await self.provider.credentials(domain)
