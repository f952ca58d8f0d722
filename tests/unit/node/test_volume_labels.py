"""What a node reports of its volumes: the slots with data in them, and its plug-ins."""

from pathlib import Path

from skep.engine.volumes.volume_plugins import VolumePlugins
from skep.model.node import EngineDescription, EnginePlugin, NodeDescription
from skep.node.host.description import volume_labels, with_plugins
from tests.support.engine.oci_rig import Machine, memory_engine
from tests.support.storage.volume_plugin import TestPlugin


def test_slots_with_data_in_volumes_are_reported() -> None:
    uses = {"data": {"web.2": 7, "stack_db.1": 9, "odd": 3, "odd.x": 3}, "logs": {"web.2": 8}}
    expected = "data=stack_db.1@9 logs=web.2@8 data=web.2@7"
    assert volume_labels(uses) == {"skep.slot-volumes": expected}
    assert volume_labels({}) == {}


async def test_volume_plug_ins_are_reported_beside_the_other_drivers(tmp_path: Path) -> None:
    engine = memory_engine(tmp_path, Machine())
    engine.volumes.plugins = VolumePlugins(tmp_path / "sockets", ())
    before = NodeDescription(engine=EngineDescription(plugins=(EnginePlugin(type="Volume", name="local"),)))
    assert with_plugins(before, engine) is with_plugins(before, None) is before
    async with TestPlugin(tmp_path).listening(tmp_path / "sockets" / "disks.sock"):
        await engine.volumes.plugins.scan()
    after = with_plugins(before, engine)
    assert [(one.type, one.name) for one in after.engine.plugins] == [
        ("Volume", "local"),
        ("Volume", "disks"),
    ]
