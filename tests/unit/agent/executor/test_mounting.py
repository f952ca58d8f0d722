"""What a task's mounts have to name."""

from pathlib import Path
from typing import cast

import pytest

from skep.agent.executor.interface import Rejected
from skep.agent.executor.mounting import Mounting
from skep.engine.bundle import Bundles
from skep.engine.mounts.volumes import Volumes
from skep.model.container import Mount, VolumeOptions


def test_a_bind_mount_without_a_source_is_rejected_in_dockers_words(tmp_path: Path) -> None:
    mounting = Mounting(Volumes(tmp_path), cast("Bundles", None))
    said = r'^invalid mount config for type "bind": field Source must not be empty$'
    with pytest.raises(Rejected, match=said):
        mounting.points([Mount(type="bind", target="/x")], ())


def test_a_volume_is_made_with_the_labels_of_its_mount(tmp_path: Path) -> None:
    volumes = Volumes(tmp_path)
    mount = Mount(type="volume", source="data", target="/v", volume_options=VolumeOptions(labels={"a": "b"}))
    Mounting(volumes, cast("Bundles", None)).points([mount], ())
    assert volumes.labels("data") == {"a": "b"}
