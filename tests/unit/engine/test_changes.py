"""What ``docker diff`` shows of a container's own layer."""

from pathlib import Path
from typing import Any, cast

import pytest

from skep.engine.containers.container import Container, ContainerConfig
from skep.engine.runtime.bundle import Bundles
from skep.model.values.ids import ContainerId


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        (("etc/hosts", "etc/hostname", "etc/resolv.conf"), []),
        (("etc/hosts", "etc/passwd"), [(0, "/etc"), (1, "/etc/passwd")]),
        (("etc/hosts", "tmp/new"), [(1, "/tmp"), (1, "/tmp/new")]),
    ],
)
def test_the_mount_points_of_the_nodes_own_files_are_no_changes(
    tmp_path: Path, written: tuple[str, ...], shown: list[tuple[int, str]]
) -> None:
    lower = tmp_path / "lower"
    (lower / "etc").mkdir(parents=True)
    container = Container(
        id=ContainerId("c" * 64),
        name="c",
        image="i",
        image_id="i",
        config=ContainerConfig(path="sh"),
        layers=(str(lower),),
    )
    unused = cast("Any", None)
    bundles = Bundles(tmp_path / "containers", tmp_path / "run", unused, unused, unused)
    for name in written:
        file = bundles.path(container.id) / "upper" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert bundles.changes(container) == shown


def test_a_link_of_a_layer_shows_nothing_of_the_machine(tmp_path: Path) -> None:
    """Whether a file of the machine exists would show as ``modified`` instead of ``added``."""
    outside, lower = tmp_path / "outside", tmp_path / "lower"
    for directory in (outside / "sub", lower):
        directory.mkdir(parents=True)
    (outside / "sub/file").touch()
    (lower / "a").symlink_to(outside)
    (lower / "b").symlink_to("/nosuch")
    container = Container(
        id=ContainerId("c" * 64),
        name="c",
        image="i",
        image_id="i",
        config=ContainerConfig(path="sh"),
        layers=(str(lower),),
    )
    unused = cast("Any", None)
    bundles = Bundles(tmp_path / "containers", tmp_path / "run", unused, unused, unused)
    upper = bundles.path(container.id) / "upper"
    (upper / "a/sub").mkdir(parents=True)
    (upper / "a/sub/file").touch()
    (upper / "b").touch()
    assert bundles.changes(container) == [(0, "/a"), (1, "/a/sub"), (1, "/a/sub/file"), (0, "/b")]
