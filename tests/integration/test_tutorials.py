"""The tutorials, run from beginning to end as they are written, in a playground under another name."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.harness.documents import ROOT, shell_blocks
from tests.support.images.registry_rig import registry_image
from tests.support.machines.lab import door_image, efk_images, shop_images
from tests.support.machines.playground_rig import SKEP
from tests.support.machines.plugins import plugin

pytestmark = [pytest.mark.slow, pytest.mark.timeout(620)]

PAGES = [
    "docs/guide/start.md",
    *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs/tutorials").glob("*.md")),
]


def _a_registry(directory: Path) -> dict[str, str]:
    (directory / "registry.tar").write_bytes(registry_image("registry:2"))
    return {}


def _the_lab(directory: Path) -> dict[str, str]:
    for name, images in (("efk", efk_images()), ("shop", shop_images())):
        for image in images:
            (directory / f"{name}-{image.image_id[-12:]}.tar").write_bytes(image.data)
    return {}


def _the_door(directory: Path) -> dict[str, str]:
    (directory / "door.tar").write_bytes(door_image().data)
    return {}


def _ansible(directory: Path) -> dict[str, str]:
    """Its command and collection of this checkout, as a user's would be installed."""
    (directory / "bin/ansible-playbook").symlink_to(Path(sys.executable).with_name("ansible-playbook"))
    return {
        "ANSIBLE_COLLECTIONS_PATH": str(plugin("ansible_collections").parent),
        "LC_ALL": "C.UTF-8",
    }


PREPARED: dict[str, Callable[[Path], dict[str, str]]] = {
    "registry.md": _a_registry,
    "lab.md": _the_lab,
    "front-door.md": _the_door,
    "ansible.md": _ansible,
}
"""What pages say is there beforehand: files, and variables of the environment."""


@pytest.fixture
def directory() -> Iterator[Path]:
    """Where the commands run.  ``skep`` and ``docker`` are the ones to test; a playground that is left is removed."""
    with tempfile.TemporaryDirectory(prefix="skep-test-", dir="/var/tmp") as name:
        directory = Path(name)
        where = f"--dir {directory}/playground --name tutorial{os.getpid()}"
        skep = directory / "bin/skep"
        skep.parent.mkdir()
        skep.write_text(
            "#!/bin/sh\n"
            f'[ "$1" = playground ] || exec {SKEP} "$@"\n'
            f'verb=$2; shift 2; exec {SKEP} playground "$verb" {where} "$@"\n'
        )
        skep.chmod(0o755)
        yield directory
        subprocess.run([skep, "playground", "down"], check=False, capture_output=True, timeout=120)


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_shows_is_so(page: str, directory: Path) -> None:
    """Pages check themselves: every command has to work, and those that look for something have to find it."""
    prepared = PREPARED.get(page.rpartition("/")[2], lambda _: {})(directory)
    blocks = shell_blocks(page)
    assert any(line.startswith("skep playground up") for line in "".join(blocks).splitlines())
    assert blocks[-1].endswith("skep playground down\n")
    log = directory / "log"
    with log.open("wb") as output:
        done = subprocess.run(
            ["bash", "-e", "-v", "-c", "".join(blocks)],
            cwd=directory,
            env={"PATH": f"{directory}/bin:{os.environ['PATH']}", "HOME": str(directory), **prepared},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            timeout=600,
            check=False,
        )
    assert done.returncode == 0, log.read_text(errors="replace")[-8000:]
