"""Git repositories that ADD clones: their addresses, and how they are fetched.

A repository is not trusted: its hooks are not run, and its submodules are fetched over the network only.

Source: buildkit, frontend/dockerfile/dfgitutil/git_ref.go, source/git/source.go, util/gitutil/git_cli.go.
"""

import asyncio
import base64
import hashlib
import os
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from urllib.parse import parse_qs, unquote_to_bytes, urlsplit, urlunsplit

import msgspec

from skep.engine.build.addresses import ambiguity, check_address, parts_of, redacted_address
from skep.engine.build.dockerfile.instructions import Copy
from skep.engine.build.files.git import Git
from skep.engine.build.files.remotes import Download, KnownAnswers, Remote, is_git, is_remote
from skep.engine.build.files.sources import CopySource
from skep.engine.build.files.trees import Tree
from skep.engine.build.interface import Provider
from skep.engine.images.archives.workers import ImageLimits
from skep.errors import InvalidArgument, Unavailable
from skep.linux.trees import remove_tree

_SSH = (
    "ssh -F /dev/null -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o BatchMode=yes"
    # Builds must not use the keys of this machine's root.
    " -o ConnectTimeout=30 -o IdentityFile=none -o CertificateFile=none"
)
_SSH_WITHOUT_AGENT = f"{_SSH} -o IdentityAgent=none"
_SHA = re.compile(r"[0-9a-f]{40}")
_TIME_S_MAX = (1 << 32) - 1
"""A commit may claim any time.  File systems do not keep times that are much later."""


class RepositoryAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Address of a repository.  ``ref``: A branch, tag or commit.  ``subdir``: The directory to copy from it."""

    remote: str
    ref: str = ""
    subdir: str = ""
    checksum: str = ""
    keep_git_dir: bool | None = None
    submodules: bool = True
    has_commit_times: bool = False
    """Whether the files have the time of the commit, and not of their checkout."""


def address_of(source: str) -> RepositoryAddress:
    """Parse an address with its fragment (``#ref:directory``) or query.  Raises: InvalidArgument."""
    check_address(source, "git address")
    remote, _, fragment = source.partition("#")
    remote, _, query = remote.partition("?")
    ref, _, subdir = fragment.partition(":")
    found: dict[str, object] = {
        "remote": remote,
        "ref": ref,
        "subdir": posixpath.normpath(f"/{subdir}").strip("/"),
    }
    named = {"fragment": ref}
    for name, values in parse_qs(query, keep_blank_values=True).items():
        if len(values) > 1:
            raise InvalidArgument(f'query "{name}" has multiple values')
        _add_option(found, named, name, values[0])
    refs = {value for value in named.values() if value}
    if len(refs) > 1:
        raise InvalidArgument(f"ref conflicts: {' vs '.join(sorted(refs))}")
    # A commit in the query is fetched, unless a reference has to lead to it.
    wanted = next(iter(refs), found.get("checksum", ""))
    address = msgspec.convert({**found, "ref": wanted}, RepositoryAddress)
    try:
        host = urlsplit(remote).hostname if _is_web(remote) else remote
    except ValueError:
        host = ""
    if not host or any(value.startswith("-") for value in (address.remote, address.ref, address.checksum)):
        raise InvalidArgument(f"invalid git address: {redacted_address(source)}")
    if hint := ambiguity(remote):
        raise InvalidArgument(f"invalid git address: {redacted_address(source)}: {hint}")
    return address


def _add_option(found: dict[str, object], refs: dict[str, str], name: str, value: str) -> None:
    switches = {"keep-git-dir": "keep_git_dir", "submodules": "submodules"}
    if name in switches:
        if value.lower() not in ("", "1", "t", "true", "0", "f", "false"):
            raise InvalidArgument(f'invalid {name} value: "{value}"')
        found[switches[name]] = value.lower() in ("", "1", "t", "true")
        return
    if not value:
        raise InvalidArgument(f'query "{name}" has no value')
    match name:
        case "ref":
            refs[name] = value
        case "tag":
            refs[name] = value if value.startswith("refs/tags/") else f"refs/tags/{value}"
        case "branch":
            refs[name] = value if value.startswith("refs/heads/") else f"refs/heads/{value}"
        case "subdir":
            wanted = posixpath.normpath(f"/{value}").strip("/")
            if found["subdir"] not in ("", wanted):
                raise InvalidArgument(f'subdir conflicts: "{found["subdir"]}" vs "{value}"')
            found["subdir"] = wanted
        case "mtime" if value in ("checkout", "commit"):
            found["has_commit_times"] = value == "commit"
        case "mtime":
            raise InvalidArgument(f'invalid mtime value: "{value}"')
        case "checksum" | "commit":
            found["checksum"] = value
        case _:
            raise InvalidArgument(f'unexpected query "{name}"')


class GitRepository(Remote):
    """Repository at an address."""

    def __init__(
        self, address: RepositoryAddress, directory: Path, limits: ImageLimits, provider: Provider | None
    ) -> None:
        """``directory``: An empty directory for the working tree."""
        self._address = address
        self._program = Git(directory, limits, redacted_address(address.remote))
        self._directory = directory
        self._provider = provider
        self._commit = ""

    async def resolve(self) -> str:
        """Return a digest of the commit and of the selected files.  Raises: SkepError."""
        address = self._address
        if not self._commit:
            await self._find_commit()
        kept = f"{self._commit}\0{address.subdir}\0{address.keep_git_dir}\0{address.submodules}"
        if address.has_commit_times:
            kept += "\0mtime"
        return f"git:{hashlib.sha256(kept.encode('utf-8', 'surrogateescape')).hexdigest()}"

    async def fetch(self) -> CopySource:
        """Check out the commit.  Raises: SkepError."""
        digest = await self.resolve()
        address, commit = self._address, self._commit
        remote = _bare(address.remote)
        await self._git("init", "--quiet", "--template=", ".")
        await self._git("remote", "add", "origin", remote)
        # Some servers allow fetching a single commit. A simple web server has only whole branches.
        wanted = address.ref or "HEAD"
        for refs in ([commit], [f"{wanted}:refs/skep/wanted"]):
            if await self._tries("fetch", "--depth=1", "--no-tags", remote, *refs):
                break
        else:
            await self._git("fetch", "--tags", remote, "+refs/heads/*:refs/remotes/origin/*")
        await self._git("-c", "advice.detachedHead=false", "checkout", "--quiet", commit)
        if address.submodules and (self._directory / ".gitmodules").exists():
            await self._git("submodule", "update", "--init", "--recursive", "--depth=1")
        time_s = await self._time_of(commit) if address.has_commit_times else None
        if not address.keep_git_dir:
            await asyncio.to_thread(remove_tree, self._directory / ".git")
        if time_s is not None:
            await asyncio.to_thread(_set_times, self._directory, time_s)
        with Tree(self._directory) as tree:
            resolved = tree.resolve(address.subdir)
            if not (self._directory / resolved).is_dir():
                raise InvalidArgument(
                    f"invalid subdir {address.subdir} of {redacted_address(address.remote)}"
                )
        return CopySource(self._directory, address.subdir, resolved, True, digest)

    async def _time_of(self, commit: str) -> int:
        """Return the time of a commit in seconds."""
        text = (await self._git("show", "--no-patch", "--format=%ct", commit)).strip()
        return min(int(text), _TIME_S_MAX) if text.isascii() and text.isdigit() else 0

    async def _find_commit(self) -> None:
        address = self._address
        ref = address.ref or "HEAD"
        if _SHA.fullmatch(ref):
            commit = ref
        else:
            listed = await self._git("ls-remote", "--", _bare(address.remote), ref, f"{ref}^{{}}")
            found = dict(line.split("\t")[::-1] for line in listed.splitlines() if line.count("\t") == 1)
            # A branch precedes a tag of the same name, as in git checkout.  A signed tag stands for its commit.
            peeled = [f"{ref}^{{}}"] if ref.startswith("refs/tags/") else []
            names = [
                *peeled,
                ref,
                f"refs/heads/{ref}",
                f"refs/{ref}",
                f"refs/tags/{ref}^{{}}",
                f"refs/tags/{ref}",
            ]
            commit = next((found[name] for name in names if name in found), "")
            if not _SHA.fullmatch(commit):
                raise InvalidArgument(
                    f"repository {redacted_address(address.remote)} does not contain ref {ref}"
                )
        if not commit.startswith(address.checksum):
            raise InvalidArgument(f"expected checksum to match {address.checksum}, got {commit}")
        self._commit = commit

    async def _tries(self, *words: str) -> bool:
        try:
            await self._git(*words)
        except Unavailable:
            return False
        return True

    async def _git(self, *words: str) -> str:
        """Run git in the working tree and return its output.  Raises: as ``Git.run``."""
        async with AsyncExitStack() as stack:
            return await self._program.run(*words, variables=await self._variables(stack, words))

    async def _variables(self, stack: AsyncExitStack, words: Sequence[str]) -> Mapping[str, str]:
        """Return the environment of a command.  Network commands get the client's secrets and ssh agent."""
        remote = self._address.remote
        reaches_network = words[0] in ("ls-remote", "fetch", "submodule")
        if _is_web(remote):
            header = await self._authorization() if reaches_network else ""
            return {"GIT_SSH_COMMAND": _SSH_WITHOUT_AGENT, **_header_for(remote, header)}
        socket = None
        if self._provider is not None and reaches_network and not remote.startswith("git://"):
            socket = await stack.enter_async_context(self._provider.ssh("default"))
        if socket is None:
            return {"GIT_SSH_COMMAND": _SSH_WITHOUT_AGENT}
        return {"GIT_SSH_COMMAND": _SSH, "SSH_AUTH_SOCK": str(socket)}

    async def _authorization(self) -> str:
        """Return the value of the header ``Authorization`` for the repository's server.  Empty without one.

        A user and password in the address take precedence, then the secrets GIT_AUTH_HEADER and GIT_AUTH_TOKEN for the
        host.  Secrets without a host are sent over TLS only.
        """
        user, colon, password = parts_of(self._address.remote).userinfo.partition(":")
        if colon:
            return _basic(unquote_to_bytes(user) + b":" + unquote_to_bytes(password))
        if self._provider is None:
            return ""
        parts = urlsplit(self._address.remote)
        for suffix in (f".{parts.hostname}", *([""] if parts.scheme == "https" else [])):
            if (header := await self._provider.secret(f"GIT_AUTH_HEADER{suffix}")) is not None:
                return header.decode("latin-1").strip()
            if (token := await self._provider.secret(f"GIT_AUTH_TOKEN{suffix}")) is not None:
                return _basic(b"x-access-token:" + token.strip())
        return ""


def _set_times(directory: Path, time_s: int) -> None:
    """Give all files below ``directory`` one time, without following links."""
    for place, directories, files in os.walk(directory):
        for name in (*directories, *files, "."):
            os.utime(os.path.join(place, name), (time_s, time_s), follow_symlinks=False)


def _basic(user_and_password: bytes) -> str:
    return "basic " + base64.b64encode(user_and_password).decode()


def _is_web(remote: str) -> bool:
    return remote.startswith(("http://", "https://"))


def _header_for(remote: str, header: str) -> Mapping[str, str]:
    """Return variables that make git send a header to the server of ``remote``, but not to redirect targets."""
    if not header:
        return {}
    origin = urlunsplit((*urlsplit(_bare(remote))[:2], "/", "", ""))
    return {
        "GIT_CONFIG_COUNT": "2",
        "GIT_CONFIG_KEY_0": f"http.{origin}.extraHeader",
        "GIT_CONFIG_VALUE_0": f"Authorization: {header}",
        "GIT_CONFIG_KEY_1": f"http.{origin}.followRedirects",
        "GIT_CONFIG_VALUE_1": "false",
    }


def _bare(remote: str) -> str:
    """Return an address without its password, and without its user unless it is an ssh address."""
    scheme, userinfo, rest = parts_of(remote)
    user = userinfo.partition(":")[0] if scheme == "ssh://" else ""
    return f"{scheme}{user}@{rest}" if user else scheme + rest


class Fetching:
    """Creates the remote sources of an ADD instruction."""

    def __init__(
        self, limits: ImageLimits, answers: KnownAnswers, provider: Provider | None, area: Callable[[], Path]
    ) -> None:
        """``area``: Creates an empty directory."""
        self._limits = limits
        self._answers = answers
        self._provider = provider
        self._area = area

    def remotes(self, copy: Copy) -> Mapping[str, Remote]:
        """Return the remote sources by name.  Raises: InvalidArgument: an address is not valid."""
        names = [name for name in copy.sources if copy.is_add and is_remote(name)]
        return {
            name: self._repository(copy, name) if is_git(name) else self._download(copy, name)
            for name in names
        }

    def _download(self, copy: Copy, name: str) -> Remote:
        area, limits = self._area(), self._limits
        room = max(min(limits.archive_bytes_max, limits.room_on(area)), 0)
        return Download(name, copy.checksum, area, room, self._answers, self._provider)

    def _repository(self, copy: Copy, name: str) -> Remote:
        address = address_of(name)
        if copy.checksum and address.checksum not in ("", copy.checksum):
            raise InvalidArgument(f"checksum mismatch {copy.checksum} != {address.checksum}")
        kept = address.keep_git_dir
        if kept is not None and copy.keep_git_dir not in (None, kept):
            raise InvalidArgument("inconsistent keep-git-dir configuration")
        address = msgspec.structs.replace(
            address,
            checksum=copy.checksum or address.checksum,
            keep_git_dir=copy.keep_git_dir if kept is None else kept,
        )
        return GitRepository(address, self._area(), self._limits, self._provider)
