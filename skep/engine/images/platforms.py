"""Compares platforms of images and machines, and chooses the best entry of an index.

Source: containerd/platforms, {database,compare,platforms}.go; moby, distribution/pull_v2_unix.go (filterManifests).
"""

import platform as machine
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import msgspec

from skep.engine.images.image import Image, ImageConfig
from skep.engine.images.registry.manifests import Descriptor
from skep.errors import InvalidArgument, NotFound

_ALIASES = {
    "i386": ("386", ""),
    "i686": ("386", ""),
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "aarch64": ("arm64", ""),
    "armhf": ("arm", "v7"),
    "armel": ("arm", "v6"),
    "armv6l": ("arm", "v6"),
    "armv7l": ("arm", "v7"),
    "armv8l": ("arm", "v8"),
}
_BASELINES = {("amd64", "v1"), ("arm64", "v8")}
_AMD64_LEVELS = (
    {"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"},
    {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"},
    {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
)
"""CPU flags (by the kernel's names) that each x86-64 level from v2 on adds.  Source: x86-64 psABI; go-archvariant."""
_OFFERED_MAX = 16
"""Limit for the platforms that an error lists."""


class ImagePlatform(msgspec.Struct, frozen=True):
    """``os/architecture[/variant]``.  The variant may be empty."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant))) if self.os else "unknown"


def this_platform() -> ImagePlatform:
    """Return this machine's platform without a variant."""
    return ImagePlatform("linux", normalized(ImagePlatform("linux", machine.machine())).architecture)


@lru_cache(maxsize=1)
def best_platform() -> ImagePlatform:
    """Return this machine's platform with the variant of its processor."""
    here = normalized(ImagePlatform("linux", machine.machine()))
    if here.architecture != "amd64":
        return here
    with suppress(OSError), Path("/proc/cpuinfo").open() as lines:
        flags = next((line for line in lines if line.startswith("flags")), "")
        return ImagePlatform("linux", "amd64", amd64_variant(flags.split()))
    return here


def amd64_variant(flags: Collection[str]) -> str:
    """Return ``v2`` to ``v4`` by the flags of a processor.  Empty for the first level."""
    level = 1
    for needed in _AMD64_LEVELS:
        if not needed <= set(flags):
            break
        level += 1
    return f"v{level}" if level > 1 else ""


def normalized(platform: ImagePlatform) -> ImagePlatform:
    """Return the platform with Go's names.  The baseline variant of an architecture is left out, except for ``arm``."""
    name = platform.architecture.lower()
    architecture, variant = _ALIASES.get(name, (name, ""))
    variant = variant or platform.variant.lower()
    if variant[:1].isdecimal():
        variant = f"v{variant}"
    variant = variant.removesuffix(".0")
    if architecture == "arm":
        variant = variant or "v7"
    if (architecture, variant) in _BASELINES:
        variant = ""
    return ImagePlatform(platform.os.lower() or "linux", architecture, variant)


def compatible(wanted: ImagePlatform) -> Sequence[ImagePlatform]:
    """Return the normalized platforms whose programs run on a machine with the platform ``wanted``, the best first.

    Source: compare.go (platformVector).
    """
    wanted = normalized(wanted)
    names = [(wanted.architecture, wanted.variant)]
    level = re.fullmatch(r"v([0-9])(?:\.([0-9]))?", wanted.variant)
    major, minor = (int(level[1]), int(level[2] or 0)) if level else (0, 0)
    if wanted.architecture == "amd64":
        names += [("amd64", f"v{one}") for one in range(major - 1, 0, -1)] + [("386", "")]
    elif wanted.architecture == "arm":
        names += [("arm", f"v{one}") for one in range(major - 1, 4, -1)]
    elif wanted.architecture == "arm64":
        names += [("arm64", f"v{major}.{one}") for one in range(minor - 1, -1, -1)]
        if major == 9:  # v9.N includes v8.(N+5)
            names += [("arm64", f"v8.{one}") for one in range(min(minor + 5, 9), -1, -1)]
        names += [("arm", f"v{one}") for one in range(8, 4, -1)]
    return [normalized(ImagePlatform(wanted.os, *name)) for name in names]


def parse_platform(text: str) -> ImagePlatform:
    """Parse a client's platform.  An empty text means this machine's platform.  Raises: InvalidArgument."""
    if not text:
        return this_platform()
    parts = text.lower().split("/")
    if len(parts) > 3:
        raise InvalidArgument(f'"{text}": cannot parse platform specifier: invalid argument')
    if not all(parts):
        raise InvalidArgument(f'"{text}": unknown operating system or architecture: invalid argument')
    if len(parts) == 1:
        parts = ["linux", this_platform().architecture if text.lower() == "linux" else parts[0]]
    found = normalized(ImagePlatform(*parts))
    if (found.architecture, found.variant, len(parts)) == ("arm", "v7", 2):
        return ImagePlatform(found.os, "arm")
    if (found.architecture, found.variant, len(parts)) == ("arm64", "", 3):
        return ImagePlatform(found.os, "arm64", "v8")
    return found


def is_for(config: ImageConfig, wanted: ImagePlatform) -> bool:
    """Return whether an image with the configuration ``config`` runs on the platform ``wanted``."""
    found, asked = platform_in(config), normalized(wanted)
    own = normalized(found)
    # Few configurations have a variant.
    is_likely = not found.variant and (own.os, own.architecture) == (asked.os, asked.architecture)
    return is_likely or own in compatible(wanted)


def best_for(images: Sequence[Image], wanted: ImagePlatform) -> Image | None:
    """Return the image that fits the platform ``wanted`` best.  None if none runs there."""
    ranks = compatible(wanted)
    fitting = [image for image in images if is_for(image.config, wanted)]
    own = {image.id: normalized(platform_in(image.config)) for image in fitting}
    return min(fitting, key=lambda one: ranks.index(own[one.id]) if own[one.id] in ranks else 0, default=None)


def platform_in(config: ImageConfig) -> ImagePlatform:
    """Return the platform that a configuration names."""
    return ImagePlatform(config.os, config.architecture, config.variant)


def require_platform(image: Image, name: str, wanted: ImagePlatform) -> None:
    """Check that ``image``, which the user calls ``name``, is for the platform ``wanted``.  Raises: NotFound.

    Source: moby, daemon/images/image.go (GetImage, OnlyPlatformWithFallback).
    """
    if is_for(image.config, wanted):
        return
    found = platform_in(image.config)
    raise NotFound(
        f"image with reference {name} was found but its platform ({found})"
        f" does not match the specified platform ({wanted})"
    )


def choose(
    manifests: Sequence[Descriptor], wanted: ImagePlatform | None = None, here: ImagePlatform | None = None
) -> Descriptor:
    """Return the best entry of an index for ``wanted``, else for a machine ``here`` (None for this machine).

    An entry without a platform is used if no other fits.

    Raises:
        NotFound: no entry fits.
    """
    ranks: dict[ImagePlatform | None, int] = {}
    here = here or best_platform()
    for one in (*compatible(wanted or here), None):
        ranks.setdefault(one, len(ranks))
    fitting = [one for one in manifests if _platform_of(one) in ranks]
    if fitting:
        return min(fitting, key=lambda one: ranks[_platform_of(one)])
    shown = wanted or ImagePlatform(here.os, here.architecture)
    raise NotFound(f"no matching manifest for {shown} in the manifest list entries{_offered(manifests)}")


def _platform_of(descriptor: Descriptor) -> ImagePlatform | None:
    found = descriptor.platform or {}
    words = [str(found.get(key) or "") for key in ("os", "architecture", "variant")]
    return normalized(ImagePlatform(*words)) if any(words) else None


def _offered(manifests: Sequence[Descriptor]) -> str:
    """Return the platforms of an index for an error message, at most ``_OFFERED_MAX``."""
    names = dict.fromkeys(
        "/".join(str(word) for word in words)
        for found in (descriptor.platform or {} for descriptor in manifests)
        if (words := [found[key] for key in ("os", "architecture", "variant") if found.get(key)])
        and found.get("os") != "unknown"  # an attestation of an image
    )
    shown = list(names)[:_OFFERED_MAX]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return f": it has {', '.join(shown)}{more}" if shown else ""
