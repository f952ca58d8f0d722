"""Cluster volumes in assignments, as SwarmKit's agents read them."""

import pytest

from skep.model.assignment import AssignmentSet
from skep.model.values.ids import VolumeId
from skep.model.values.meta import Driver
from skep.model.volume import (
    AccessMode,
    TypeBlock,
    TypeMount,
    VolumeAssignment,
    VolumeScope,
    VolumeSecret,
    VolumeSharing,
)
from skep.wire import swarm_pb2 as pb
from skep.wire.convert.assignments import assignments_from_pb, changes_to_pb


@pytest.mark.parametrize("scope", list(VolumeScope))
@pytest.mark.parametrize("sharing", list(VolumeSharing))
def test_volumes_go_there_and_back(scope: VolumeScope, sharing: VolumeSharing) -> None:
    mount = TypeMount(fs_type="xfs", mount_flags=("noatime",))
    one = VolumeAssignment(
        id=VolumeId("v1"),
        volume_id="disk-1",
        driver=Driver(name="d", options={"a": "b"}),
        volume_context={"c": "d"},
        publish_context={"e": "f"},
        access_mode=AccessMode(scope=scope, sharing=sharing, mount_volume=mount),
        secrets=(VolumeSecret(key="k", secret="s"),),
    )
    other = VolumeAssignment(id=VolumeId("v2"), access_mode=AccessMode(block_volume=TypeBlock()))
    given = AssignmentSet(complete=False, volumes=(one,), removed_volumes=(other,))
    message = pb.AssignmentsMessage(type=pb.AssignmentsMessage.INCREMENTAL, changes=changes_to_pb(given))
    assert assignments_from_pb(pb.AssignmentsMessage.FromString(message.SerializeToString())) == given


def test_the_numbers_are_swarmkits() -> None:
    """Source: swarmkit, api/{types,dispatcher}.proto."""
    mode = {one.name: one.number for one in pb.VolumeAccessMode.DESCRIPTOR.fields}
    assert mode == {"scope": 1, "sharing": 2, "block": 3, "mount": 4}
    assert [one.name for one in pb.VolumeAssignment.DESCRIPTOR.fields] == [
        *("id", "volume_id", "driver", "volume_context", "publish_context", "access_mode", "secrets"),
    ]
    assert pb.Assignment.DESCRIPTOR.fields_by_name["volume"].number == 4
    assert [pb.VolumeAccessMode.Sharing.Name(number) for number in range(4)] == [
        *("NONE", "READ_ONLY", "ONE_WRITER", "ALL"),
    ]
