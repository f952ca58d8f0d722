"""Options of a BuildKit client's request: each option is supported, or refused by name.

Source: moby/buildkit, frontend/dockerui/config.go, exporter/; docker/buildx, build/opt.go.
"""

from collections.abc import Mapping, Sequence
from enum import Enum

import msgspec

from skep.engine.build.addresses import redacted_address
from skep.engine.build.dockerfile.targets import context_name, parse_epoch, tags_of
from skep.engine.build.interface import StepLimits
from skep.engine.buildkit import buildkit_pb2 as pb
from skep.engine.images.platforms import normalized, parse_platform
from skep.engine.images.reference import Reference
from skep.errors import InvalidArgument, PermissionDenied, Unimplemented
from skep.model.container import Ulimit

DOCKERFILE = "dockerfile.v0"
_GATEWAY = "gateway.v0"

_IGNORED = ("frontend.caps", "input-metadata:", "vcs:")
"""Options that do not affect the image: the client's capabilities, and the origin of its files (for provenance)."""
_PLATFORMS_MAX = 16
"""More platforms than qemu's user emulation has processors that Docker names."""
_DEFAULT_PROVENANCE = ("mode=min,inline-only=true", "false", "disabled=true")


class BuildOutput(Enum):
    """Destination of the result."""

    IMAGE = "image"
    """The engine's image store."""
    LOCAL = "local"
    """A directory of the client."""
    TAR = "tar"
    """A file of the client."""
    NONE = "none"


class ClientDirectory(msgspec.Struct, frozen=True):
    """Directory of a client.  ``session``: Empty for the build's own."""

    name: str
    session: str = ""


class BuildOptions(msgspec.Struct, frozen=True, kw_only=True):
    """One build, as far as it is known before its Dockerfile is read."""

    filename: str = "Dockerfile"
    context: ClientDirectory = ClientDirectory("context")
    dockerfile: ClientDirectory = ClientDirectory("dockerfile")
    remote: str = ""
    """Context that is an archive uploaded by the client, or another address."""
    has_own_dockerfile: bool = False
    """Whether the Dockerfile is the client's own, outside the remote context."""
    keeps_git_dir: bool = False
    images: Mapping[str, str] = {}
    """Named contexts that are images, by the names that stand for them in the Dockerfile."""
    directories: Mapping[str, ClientDirectory] = {}
    """Named contexts that are directories of the client."""
    remotes: Mapping[str, str] = {}
    """Named contexts that are fetched: addresses of git repositories and of files."""
    target: str = ""
    arguments: Mapping[str, str] = {}
    labels: Mapping[str, str] = {}
    use_cache: bool = True
    stages_without_cache: tuple[str, ...] = ()
    pull: bool = False
    network: str = ""
    hosts: tuple[str, ...] = ()
    limits: StepLimits = StepLimits()
    platforms: tuple[str, ...] = ("",)
    """Platforms of the images, each one once.  Empty text for the default."""
    is_index: bool = False
    """Whether the images are named together, as an image for several platforms."""
    hostname: str = ""
    cache_namespace: str = ""
    epoch_s: int | None = None
    cache_sources: tuple["CacheEntry", ...] = ()
    """Values of ``--cache-from``."""
    inline_cache: bool = False
    """``BUILDKIT_INLINE_CACHE=1``: whether the image is a cache source."""
    checks: str = ""
    """``BUILDKIT_DOCKERFILE_CHECK``, which overrides the Dockerfile's own directive."""
    request: str = ""
    """Request other than a build, like ``frontend.lint``.  Empty for a build."""
    has_syntax: bool = False
    """Whether the request names the front end, so that the Dockerfile's own directive is ignored."""


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """Export of the result."""

    output: BuildOutput = BuildOutput.NONE
    tags: tuple[Reference, ...] = ()
    rewrites_times: bool = False
    """Whether ``SOURCE_DATE_EPOCH`` also limits the times of files in the layers."""
    is_pushed: bool = False
    """Whether the tags are pushed to their registries."""
    is_split: bool = True
    """Whether the files of each of several platforms get a directory of their own."""


class CacheEntry(msgspec.Struct, frozen=True, rename="pascal"):
    """Cache source or export."""

    type: str = ""
    attrs: Mapping[str, str] = {}

    @property
    def key(self) -> tuple[str, ...]:
        """Type and attributes, to tell entries apart."""
        return (self.type, *(text for pair in sorted(self.attrs.items()) for text in pair))

    @property
    def name(self) -> str:
        """Name for messages: an image, a directory or the type."""
        attrs = self.attrs
        return redacted_address(attrs.get("ref") or attrs.get("src") or attrs.get("dest") or self.type)


def parse_options(
    frontend: str, attributes: Mapping[str, str], inputs: Mapping[str, str] | None = None
) -> BuildOptions:
    """Parse the options of a request.

    ``inputs``: Images that are results of other builds, by their names in the attributes.

    Raises: Unimplemented, InvalidArgument: with the name of the unsupported or invalid option.
    """
    if frontend not in (DOCKERFILE, _GATEWAY):
        raise Unimplemented(f"front end {frontend} is not supported: use {DOCKERFILE}")
    left = {name: value for name, value in attributes.items() if not name.startswith(_IGNORED)}
    if frontend == _GATEWAY:
        check_syntax(left.pop("source", ""))
        left.pop("cmdline", None)
    arguments = _taken(left, "build-arg:")
    _refuse(left, arguments)
    sessions = _taken(left, "local-sessionid:")
    images, directories, remotes = _contexts(_taken(left, "context:"), sessions, inputs or {})
    use_cache, stages = _use_cache(left)
    platforms = _platforms(left.pop("platform", ""))
    is_index = is_true(arguments.get("BUILDKIT_MULTI_PLATFORM", "") or left.pop("multi-platform", ""))
    has_own_dockerfile = "dockerfilekey" in left
    context, dockerfile = left.pop("contextkey", "context"), left.pop("dockerfilekey", "dockerfile")
    build = BuildOptions(
        filename=left.pop("filename", "") or "Dockerfile",
        context=ClientDirectory(context, sessions.get(context, "")),
        dockerfile=ClientDirectory(dockerfile, sessions.get(dockerfile, "")),
        remote=left.pop("context", ""),
        has_own_dockerfile=has_own_dockerfile,
        keeps_git_dir=is_true(arguments.pop("BUILDKIT_CONTEXT_KEEP_GIT_DIR", "")),
        images=images,
        directories=directories,
        remotes=remotes,
        target=left.pop("target", ""),
        arguments=arguments,
        labels=_taken(left, "label:"),
        use_cache=use_cache,
        stages_without_cache=stages,
        pull=left.pop("image-resolve-mode", "") == "pull",
        network=left.pop("force-network-mode", ""),
        hosts=_hosts(left.pop("add-hosts", "")),
        limits=_limits(left),
        platforms=platforms,
        is_index=is_index or len(platforms) > 1,
        hostname=left.pop("hostname", "") or arguments.get("BUILDKIT_SANDBOX_HOSTNAME", ""),
        cache_namespace=arguments.get("BUILDKIT_CACHE_MOUNT_NS", ""),
        epoch_s=parse_epoch(arguments.get("SOURCE_DATE_EPOCH", "")),
        cache_sources=_cache_sources(left),
        inline_cache=is_true(arguments.get("BUILDKIT_INLINE_CACHE", "")),
        checks=arguments.get("BUILDKIT_DOCKERFILE_CHECK", ""),
        request=left.pop("requestid", ""),
        has_syntax=bool(arguments.get("BUILDKIT_SYNTAX", "")),
    )
    for name, value in left.items():
        if value:
            raise Unimplemented(f"build option {name} is not supported")
    return build


def check_syntax(image: str) -> None:
    """Check that this engine reads the language that ``# syntax=`` names.

    Docker's own language is accepted in every version and channel.  Unsupported instructions are refused one by one.

    Raises: Unimplemented: another language.
    """
    name = image.split()[0] if image.strip() else ""
    name = name.partition("@")[0]
    repository = name.removeprefix("docker.io/").partition(":")[0]
    if repository not in ("", DOCKERFILE, "docker/dockerfile", "docker/dockerfile-upstream"):
        raise Unimplemented(f"front end {name} is not supported: this engine reads Dockerfiles itself")


def _taken(left: dict[str, str], prefix: str) -> dict[str, str]:
    """Remove the options with this prefix from ``left``, and return them without the prefix."""
    names = [name for name in left if name.startswith(prefix)]
    return {name.removeprefix(prefix): left.pop(name) for name in names}


def _refuse(left: dict[str, str], arguments: dict[str, str]) -> None:
    """Refuse options of BuildKit that are not supported.  Raises: Unimplemented."""
    check_syntax(arguments.get("BUILDKIT_SYNTAX", ""))
    for kind, value in _taken(left, "attest:").items():
        if kind != "provenance" or value not in _DEFAULT_PROVENANCE:
            raise Unimplemented(f"attestations are not supported: {kind}")


def _platforms(text: str) -> tuple[str, ...]:
    """Return the platforms of a request in BuildKit's form, each one once.  Raises: InvalidArgument."""
    names = [str(normalized(parse_platform(name.strip()))) for name in text.split(",") if name.strip()]
    if len(names) > _PLATFORMS_MAX:
        raise InvalidArgument(f"an image has at most {_PLATFORMS_MAX} platforms")
    return tuple(dict.fromkeys(names)) or ("",)


def is_true(value: str) -> bool:
    """Return whether an option is set, as Go's ``strconv.ParseBool`` reads it."""
    return value.lower() in ("1", "t", "true")


def _use_cache(left: dict[str, str]) -> tuple[bool, tuple[str, ...]]:
    """Return whether the build uses the cache, and the stages that do not."""
    if "no-cache" not in left:
        return True, ()
    stages = left.pop("no-cache")
    return bool(stages), tuple(stages.lower().split(",")) if stages else ()


def _contexts(
    named: Mapping[str, str], sessions: Mapping[str, str], inputs: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, ClientDirectory], dict[str, str]]:
    """Return named contexts: images, directories and addresses.  Raises: Unimplemented: another kind of context."""
    images, directories, remotes = {}, {}, {}
    for name, value in named.items():
        kind, separator, rest = value.partition(":")
        if kind == "docker-image" and separator:
            images[context_name(name)] = rest.removeprefix("//")
        elif kind == "input" and rest in inputs:
            images[context_name(name)] = inputs[rest]
        elif kind == "local" and separator:
            directories[context_name(name)] = ClientDirectory(rest, sessions.get(rest, ""))
        elif kind in ("http", "https", "git") or kind.startswith("git@"):
            remotes[context_name(name)] = value
        else:
            raise Unimplemented(f"named context {name} is not supported: {redacted_address(value)}")
    return images, directories, remotes


def _hosts(text: str) -> tuple[str, ...]:
    """Convert ``name=address,...`` to ``name:address``.  Raises: InvalidArgument."""
    hosts = []
    for part in filter(None, text.split(",")):
        name, separator, address = part.partition("=")
        if not (name and separator and address):
            raise InvalidArgument(f"invalid key-value pair {part}")
        hosts.append(f"{name}:{address}")
    return tuple(hosts)


def _limits(left: dict[str, str]) -> StepLimits:
    quota, period = _number(left, "cpuquota"), _number(left, "cpuperiod") or 100_000
    return StepLimits(
        memory_bytes=_number(left, "memory"),
        nano_cpus=quota * 1_000_000_000 // period,
        shm_bytes=_number(left, "shm-size") or StepLimits().shm_bytes,
        ulimits=tuple(map(_ulimit, filter(None, left.pop("ulimit", "").split(",")))),
    )


def _number(left: dict[str, str], name: str) -> int:
    text = left.pop(name, "") or "0"
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise InvalidArgument(f"invalid value of {name}: {text}")
    return int(text)


def _ulimit(text: str) -> Ulimit:
    name, _, limits = text.partition("=")
    soft, _, hard = limits.partition(":")
    try:
        return Ulimit(name=name, soft=int(soft), hard=int(hard or soft))
    except ValueError as error:
        raise InvalidArgument(f"invalid ulimit argument: {text}") from error


def _cache_sources(left: dict[str, str]) -> tuple[CacheEntry, ...]:
    """Return the cache sources in the front end's options.  Raises: InvalidArgument: they cannot be read."""
    images = [image for image in left.pop("cache-from", "").split(",") if image]
    text = left.pop("cache-imports", "")
    try:
        entries = msgspec.json.decode(text, type=list[CacheEntry]) if text else []
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"failed to unmarshal cache-imports: {error}") from error
    return (*(CacheEntry("registry", {"ref": image}) for image in images), *entries)


def cache_entries(options: pb.CacheOptions) -> tuple[Sequence[CacheEntry], Sequence[CacheEntry]]:
    """Return the cache sources and exports that a request names outside the front end's options."""
    imports = [CacheEntry("registry", {"ref": ref}) for ref in options.import_refs]
    imports += [CacheEntry(entry.type, dict(entry.attrs)) for entry in options.imports]
    exports = [CacheEntry(entry.type, dict(entry.attrs)) for entry in options.exports]
    if options.export_ref:
        exports.append(CacheEntry("registry", {"ref": options.export_ref}))
    return imports, exports


def check_cache_exports(entries: Sequence[CacheEntry]) -> None:
    """Check the types of cache exports.  Raises: InvalidArgument, in BuildKit's words: one is not known.

    Source: buildkit, control/control.go (Solve).
    """
    for entry in entries:
        if entry.type not in ("inline", "registry", "local"):
            raise InvalidArgument(f'unknown cache exporter: "{entry.type}"')


_EXPORT_IGNORED = ("push", "load", "registry.insecure", "prefer-image-digest", "unpack", "context", "dest")
"""Image export options without effect: an image is always unpacked."""


def exported(exporters: Sequence[tuple[str, Mapping[str, str]]]) -> Exported:
    """Parse the exporters of a request.  Raises: Unimplemented, InvalidArgument."""
    if len(exporters) > 1:
        raise Unimplemented("multiple outputs are not supported")
    for kind, attributes in exporters:
        if kind in ("moby", "image"):
            known = {"name", "rewrite-timestamp", *_EXPORT_IGNORED}
            left = {name for name, value in attributes.items() if value} - known
            if left:
                raise Unimplemented(f"output option {min(left)} is not supported")
            tags = tags_of(attributes.get("name", "").split(","))
            is_pushed = is_true(attributes.get("push", ""))
            if is_pushed and not tags:
                raise InvalidArgument("tag is needed when pushing to registry")
            return Exported(
                output=BuildOutput.IMAGE,
                tags=tags,
                rewrites_times=is_true(attributes.get("rewrite-timestamp", "")),
                # Since 0.11, buildx lets workers with a snapshotter push results of ``moby``. Earlier versions push by
                # the engine's API afterwards, and then find that the registry has everything.
                is_pushed=is_pushed,
            )
        if kind not in (BuildOutput.LOCAL.value, BuildOutput.TAR.value):
            raise Unimplemented(f'exporter "{kind}" could not be found')
        for name, value in attributes.items():
            if value and name not in ("dest", "context") and (name, value) != ("platform-split", "false"):
                raise Unimplemented(f"output option {name} is not supported")
        return Exported(output=BuildOutput(kind), is_split=attributes.get("platform-split", "") != "false")
    return Exported()


def check_network(build: BuildOptions, entitlements: Sequence[str]) -> None:
    """Check the use of the host's network.  Raises: PermissionDenied, in BuildKit's words: it is not granted."""
    if build.network == "host" and "network.host" not in entitlements:
        raise PermissionDenied("network.host is not allowed")


def check_entitlements(entitlements: Sequence[str]) -> None:
    """Refuse entitlements other than the host's network.  Raises: PermissionDenied."""
    for name in entitlements:
        if name != "network.host":
            raise PermissionDenied(
                f"granting entitlement {name} is not allowed by build daemon configuration"
            )
