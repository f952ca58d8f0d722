"""Images for several platforms, as buildx asks for them: built, pushed, and pulled by nodes of each platform."""

import asyncio
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from skep.engine.build.emulation import HANDLERS, emulated, read_emulators
from skep.engine.images.platforms import parse_platform, this_platform
from skep.engine.images.store import ImageStore
from tests.support.builds.build_lab import BuildLab, build_lab
from tests.support.builds.dockerfile_cases import Host
from tests.support.images.programs import program
from tests.support.images.registry_rig import docker_registry
from tests.support.machines.playground_rig import CLIS
from tests.support.machines.plugins import plugin

pytestmark = pytest.mark.timeout(300)

BOTH = ("--platform", "linux/amd64,linux/arm64")
ARM64 = parse_platform("linux/arm64")
DOCKERFILE = (
    "FROM --platform=$BUILDPLATFORM busybox:1 AS made\nARG TARGETPLATFORM BUILDPLATFORM TARGETARCH\n"
    'RUN echo "$TARGETPLATFORM $TARGETARCH on $BUILDPLATFORM" > /target\n'
    "FROM scratch\nARG TARGETARCH\nCOPY program-$TARGETARCH /program\nCOPY --from=made /target /target\n"
)


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[str]:
    async with docker_registry(tmp_path / "registry") as address:
        yield address


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[BuildLab]:
    assert this_platform() == parse_platform("linux/amd64"), "the tests name the platforms of this machine"
    async with build_lab(tmp_path) as lab:
        yield lab


def context(lab: BuildLab, dockerfile: str = DOCKERFILE) -> Path:
    place = lab.context(dockerfile)
    for name in ("amd64", "arm64"):
        (place / f"program-{name}").write_bytes(program(name))
        (place / f"program-{name}").chmod(0o755)
    return place


async def built(lab: BuildLab, place: Path, *options: str, output: str = "") -> str:
    code, text = await _host(lab).build(place, *options, output=output)
    assert code == 0, text
    return text


async def refused(lab: BuildLab, place: Path, *options: str) -> str:
    code, text = await _host(lab).build(place, *options)
    assert code != 0, text
    return text


def _host(lab: BuildLab) -> Host:
    return Host(f"unix://{lab.socket}", CLIS[0], plugin("docker-buildx"))


async def pulled(place: Path, name: str, platform: str) -> tuple[str, str]:
    """The architecture of an image that another node pulls for its platform, and one of the image's files."""
    images = ImageStore(place)
    await images.open()
    image = await images.pull(name, platform=platform)
    texts = [(layer / "target").read_text() for layer in images.layers(image) if (layer / "target").exists()]
    return image.config.architecture, texts[0]


async def test_an_image_for_two_platforms_is_built_pushed_and_pulled_by_nodes_of_both(
    lab: BuildLab, registry: str, tmp_path: Path
) -> None:
    place, name = context(lab), f"{registry}/app:1"
    text = await built(lab, place, *BOTH, "-t", name)
    for platform in ("linux/amd64", "linux/arm64"):
        assert f"[{platform} made 3/7] RUN echo" in text
    assert lab.images.get(name).config.architecture == "amd64", "the name means the node's own platform"
    listed = await lab.docker("images", "--format", "{{.Repository}}:{{.Tag}}")
    assert listed.output.split().count(name) == 1
    assert "<none>" not in listed.output
    tagged = await lab.docker("tag", name, f"{registry}/app:2")
    assert tagged.exit == 0, tagged.output
    pushed = await lab.docker("push", f"{registry}/app:2")
    assert pushed.exit == 0, pushed.output
    for platform, number in (("linux/amd64", 1), ("linux/arm64", 2)):
        architecture, target = await pulled(tmp_path / f"node-{number}", f"{registry}/app:2", platform)
        assert architecture == platform.removeprefix("linux/")
        assert target == f"{platform} {architecture} on linux/amd64\n"
    again = await built(lab, place, *BOTH, "-t", f"{registry}/app:3", "--push")
    assert again.count("CACHED") >= 4
    assert (await pulled(tmp_path / "node-3", f"{registry}/app:3", "linux/arm64"))[0] == "arm64"


async def test_the_images_for_other_platforms_stay_as_long_as_the_name(lab: BuildLab) -> None:
    await built(lab, context(lab), *BOTH, "-t", "app:1")
    members = {one.id for one in lab.images.index(lab.images.get("app:1").tags[0])}
    assert len(members) == 2
    await lab.docker("tag", "app:1", "app:2")
    for words in (("image", "prune", "-f"), ("rmi", "app:1")):
        done = await lab.docker(*words)
        assert done.exit == 0, done.output
        assert members <= {image.id for image in lab.images.images()}
    done = await lab.docker("rmi", "app:2")
    assert done.exit == 0, done.output
    assert members.isdisjoint({image.id for image in lab.images.images()})


async def test_a_new_build_for_one_platform_has_no_index(lab: BuildLab, registry: str) -> None:
    name = f"{registry}/app:1"
    await built(lab, context(lab), *BOTH, "-t", name)
    await built(lab, context(lab), "-t", name)
    assert not lab.images.index(lab.images.get(name).tags[0])
    pushed = await lab.docker("push", name)
    assert pushed.exit == 0, pushed.output


async def test_a_base_image_for_another_platform_leaves_the_tag_to_this_machine(
    lab: BuildLab, registry: str
) -> None:
    base = f"{registry}/base:1"
    await built(lab, context(lab), *BOTH, "-t", base, "--push")
    await lab.docker("rmi", base)
    pulled = await lab.docker("pull", base)
    assert pulled.exit == 0, pulled.output
    own = lab.images.get(base)
    place = context(lab, f"FROM {base}\nCOPY program-arm64 /more\n")
    for number in range(2):  # the second time, the image that was pulled aside is found
        await built(lab, place, "--platform", "linux/arm64", "-t", f"app:{number}")
        assert lab.images.get(f"app:{number}").config.architecture == "arm64"
    assert lab.images.get(base).id == own.id
    assert own.config.architecture == "amd64"


async def test_a_base_image_without_the_platform_is_refused(lab: BuildLab, registry: str) -> None:
    name = f"{registry}/own:1"
    await built(lab, lab.context("FROM busybox:1\nCOPY Dockerfile /x\n"), "-t", name)
    place = lab.context(f"FROM {name}\n")
    text = await refused(lab, place, "--platform", "linux/arm64")
    assert f"base image {name} is here for linux/amd64, not linux/arm64: " in text
    await lab.docker("push", name)
    text = await refused(lab, place, "--platform", "linux/arm64")
    assert f"base image {name} is for linux/amd64, and not for linux/arm64" in text
    assert lab.images.get(name).config.architecture == "amd64"


async def test_the_files_of_each_platform_get_a_directory(lab: BuildLab, tmp_path: Path) -> None:
    await built(lab, context(lab), *BOTH, output=f"type=local,dest={tmp_path / 'out'}")
    for name in ("amd64", "arm64"):
        place = tmp_path / f"out/linux_{name}"
        assert (place / "program").read_bytes() == program(name)
        assert (place / "target").read_text() == f"linux/{name} {name} on linux/amd64\n"
    text = await refused(lab, context(lab), *BOTH, "-o", f"type=tar,dest={tmp_path / 'out.tar'}")
    assert "output tar is not supported for multiple platforms: use local" in text


async def test_a_cache_has_the_steps_of_all_platforms(lab: BuildLab, registry: str) -> None:
    ref, place = f"type=registry,ref={registry}/cache:1", context(lab)
    await built(lab, place, *BOTH, "-t", "app:1", "--cache-to", f"{ref},mode=max")
    await lab.images.prune(lambda image: "busybox:1" not in {one.familiar for one in image.tags}, users=tuple)
    await lab.docker("rmi", "app:1")
    again = await built(lab, place, *BOTH, "-t", "app:1", "--cache-from", ref)
    assert again.count("CACHED") >= 6, again
    assert " RUN " not in "".join(
        line for line in again.splitlines() if " DONE " in line and "CACHED" not in line
    )


async def test_a_step_of_another_platform_names_the_remedy_without_an_emulator(lab: BuildLab) -> None:
    if ARM64 in emulated(read_emulators()):
        pytest.skip("this machine runs programs for arm64")
    text = await refused(lab, context(lab, DOCKERFILE + 'RUN ["/program"]\n'), *BOTH, "-t", "app:1")
    assert "has no emulator for linux/arm64: install the package qemu-user-static on the node" in text
    assert lab.images.lookup("app:1") is None


@pytest.fixture
async def emulator(tmp_path: Path) -> AsyncIterator[None]:
    """As ``make emulated`` does it: qemu's user emulation is unpacked and registered, and removed afterwards."""
    script = ". setup/say.sh; . setup/machine.sh; "
    is_here = ARM64 in emulated(read_emulators())
    if not is_here:
        words = ("bash", "-ec", f'{script} emulate arm64 "$1"', "emulate", str(tmp_path / "qemu"))
        await asyncio.to_thread(subprocess.run, words, check=True, timeout=120)
    yield
    if not is_here:
        (HANDLERS / "skep-qemu-aarch64").write_text("-1")


@pytest.mark.slow
@pytest.mark.usefixtures("emulator")
async def test_steps_of_another_platform_run_by_the_kernels_emulator(lab: BuildLab) -> None:
    place = context(lab, DOCKERFILE + 'RUN ["/program"]\n')
    await built(lab, place, *BOTH, "-t", "app:1")
    for image in lab.images.index(lab.images.get("app:1").tags[0]):
        assert any((layer / "made").is_dir() for layer in lab.images.layers(image)), image.config.architecture
    ran = await lab.docker("run", "--name", "ran", "--platform", "linux/arm64", "app:1", "/program")
    assert "File exists" not in ran.output
    shown = await _host(lab).run(str(plugin("docker-buildx")), "inspect")
    assert "linux/arm64" in shown[1]
