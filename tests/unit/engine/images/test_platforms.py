"""Which entry of an index is for this machine, and where an image runs."""

import pytest

from skep.engine.images.digest import Digest
from skep.engine.images.image import Image, ImageConfig
from skep.engine.images.platforms import (
    ImagePlatform,
    amd64_variant,
    best_platform,
    choose,
    compatible,
    normalized,
    parse_platform,
    require_platform,
)
from skep.engine.images.registry.manifests import Descriptor
from skep.errors import NotFound

V2 = ["cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"]
V3 = [*V2, *["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"]]
V4 = [*V3, *["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"]]


def entry(name: str | None) -> Descriptor:
    """An entry of an index for the platform ``name``."""
    words = dict(zip(("os", "architecture", "variant"), (name or "").split("/"), strict=False))
    return Descriptor(digest=str(name), size=1, platform=words if name else None)


@pytest.mark.parametrize(
    ("wanted", "offered", "chosen"),
    [
        ("linux/amd64", ["linux/amd64/v3", "linux/amd64/v2", "linux/amd64"], "linux/amd64"),
        ("linux/amd64", ["linux/amd64/v2", "linux/amd64/v1"], "linux/amd64/v1"),
        ("linux/amd64/v3", ["linux/amd64", "linux/amd64/v2", "linux/amd64/v4"], "linux/amd64/v2"),
        ("linux/amd64", ["linux/386", "linux/amd64/v2"], "linux/386"),
        ("linux/x86_64", ["linux/arm64", "linux/amd64"], "linux/amd64"),
        ("linux/arm/v7", ["linux/arm/v5", "linux/arm/v7", "linux/arm/v6"], "linux/arm/v7"),
        ("linux/arm/v6", ["linux/arm/v7", "linux/arm/v5"], "linux/arm/v5"),
        ("linux/arm", ["linux/arm/v6", "linux/arm"], "linux/arm"),
        ("linux/aarch64", ["linux/arm/v7", "linux/arm64/v8"], "linux/arm64/v8"),
        ("linux/arm64", ["linux/arm/v7", "linux/amd64"], "linux/arm/v7"),
        ("linux/arm64/v9", ["linux/arm64/v9.1", "linux/arm64/v8.5", "linux/arm64"], "linux/arm64/v8.5"),
        ("linux/amd64", [None, "linux/386"], "linux/386"),
        ("linux/amd64", ["unknown/unknown", None], "None"),
        ("linux/riscv64", ["linux/amd64", "linux/riscv64", "linux/riscv64"], "linux/riscv64"),
    ],
)
def test_of_an_index_the_best_that_runs_there_is_taken(
    wanted: str, offered: list[str | None], chosen: str
) -> None:
    assert choose([entry(name) for name in offered], parse_platform(wanted)).digest == chosen


@pytest.mark.parametrize(
    ("wanted", "offered"),
    [("linux/amd64", "linux/amd64/v2"), ("linux/arm/v6", "linux/arm/v7"), ("linux/386", "linux/amd64")],
)
def test_what_may_not_run_there_is_not_taken(wanted: str, offered: str) -> None:
    words = f"^no matching manifest for {wanted} in the manifest list entries: it has {offered}$"
    with pytest.raises(NotFound, match=words):
        choose([entry(offered)], parse_platform(wanted))


@pytest.mark.parametrize(
    ("flags", "variant"),
    [
        ([], ""),
        (V2[1:], ""),
        (V2, "v2"),
        (V3[:-1], "v2"),
        (V3, "v3"),
        (V4[:-1], "v3"),
        (V4, "v4"),
        (V4[7:], ""),
    ],
)
def test_the_variant_of_a_processor_is_in_its_flags(flags: list[str], variant: str) -> None:
    assert amd64_variant(flags) == variant


def test_without_a_platform_it_is_what_this_machine_runs_at_best() -> None:
    assert best_platform() == normalized(best_platform())
    here = ImagePlatform("linux", "amd64", "v3")
    offered = [entry("linux/amd64/v4"), entry("linux/amd64"), entry("linux/amd64/v3")]
    assert choose(offered, here=here).digest == "linux/amd64/v3"
    with pytest.raises(NotFound, match=r"^no matching manifest for linux/amd64 in"):
        choose(offered[:1], here=here)


def test_what_a_registry_calls_a_platform_may_be_anything() -> None:
    odd = Descriptor(digest="x", size=1, platform={"os": ["linux"], "architecture": 7, "variant": None})
    with pytest.raises(NotFound):
        choose([odd], ImagePlatform("linux", "amd64"))


@pytest.mark.parametrize(
    ("text", "platform"),
    [
        ("linux/x86_64", ImagePlatform("linux", "amd64")),
        ("aarch64", ImagePlatform("linux", "arm64")),
        ("linux/arm64/v8", ImagePlatform("linux", "arm64", "v8")),
        ("linux/armhf", ImagePlatform("linux", "arm")),
        ("linux/armel", ImagePlatform("linux", "arm", "v6")),
        ("linux/amd64/v1", ImagePlatform("linux", "amd64")),
        ("linux/arm/7", ImagePlatform("linux", "arm", "v7")),
    ],
)
def test_platforms_have_other_names(text: str, platform: ImagePlatform) -> None:
    assert parse_platform(text) == platform


def test_every_platform_is_the_best_for_itself() -> None:
    for text in ("linux/amd64", "linux/amd64/v3", "linux/arm/v6", "linux/arm64", "linux/arm64/v9.2"):
        platform = parse_platform(text)
        assert compatible(platform)[0] == normalized(platform)


def an_image(os: str, architecture: str, variant: str = "") -> Image:
    return Image(
        id=Digest("sha256:" + "0" * 64),
        config=ImageConfig(os=os, architecture=architecture, variant=variant),
    )


@pytest.mark.parametrize(
    ("image", "wanted"),
    [
        (an_image("linux", "amd64"), "linux/amd64"),
        (an_image("linux", "amd64"), "linux/amd64/v3"),
        (an_image("linux", "386"), "linux/amd64"),
        (an_image("", "amd64"), "linux/amd64"),
        (an_image("linux", "arm"), "linux/arm/v6"),
        (an_image("linux", "arm", "v6"), "linux/arm/v7"),
        (an_image("linux", "arm64", "v8"), "linux/arm64"),
    ],
)
def test_an_image_is_for_a_platform_that_runs_it(image: Image, wanted: str) -> None:
    require_platform(image, "app", parse_platform(wanted))


@pytest.mark.parametrize(
    ("image", "found", "wanted"),
    [
        (an_image("linux", "s390x"), "linux/s390x", "linux/amd64"),
        (an_image("linux", "amd64"), "linux/amd64", "linux/386"),
        (an_image("linux", "arm", "v7"), "linux/arm/v7", "linux/arm/v6"),
        (an_image("windows", "amd64"), "windows/amd64", "linux/amd64"),
        (an_image("", "s390x"), "unknown", "linux/amd64"),
    ],
)
def test_an_image_for_another_platform_is_refused_in_dockers_words(
    image: Image, found: str, wanted: str
) -> None:
    with pytest.raises(NotFound) as refused:
        require_platform(image, "app", parse_platform(wanted))
    assert str(refused.value) == (
        f"image with reference app was found but its platform ({found})"
        f" does not match the specified platform ({wanted})"
    )
