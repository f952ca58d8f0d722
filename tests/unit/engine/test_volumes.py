"""Mounts of containers, and the volumes made for them."""

from pathlib import Path

from skep.engine.volumes import Volumes, mount_point
from skep.model.container import Mount, TmpfsOptions, VolumeOptions


def test_a_volume_is_made_with_the_labels_of_its_mount(tmp_path: Path) -> None:
    volumes = Volumes(tmp_path)
    mount = Mount(type="volume", source="data", target="/v", volume_options=VolumeOptions(labels={"a": "b"}))
    volumes.mount_points([mount], ())
    assert volumes.labels("data") == {"a": "b"}


def test_tmpfs_options_replace_their_opposites() -> None:
    mount = Mount(type="tmpfs", target="/t", tmpfs_options=TmpfsOptions(options=(("exec",), ("uid", "7"))))
    assert mount_point(mount, "", "").options == ("nosuid", "nodev", "rprivate", "exec", "uid=7")
