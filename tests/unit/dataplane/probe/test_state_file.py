"""What one process leaves to the next."""

from pathlib import Path

from skep.dataplane.probe.mtu import Measured
from skep.dataplane.probe.packets import Said
from skep.dataplane.probe.state_file import Kept, load, save
from skep.model.ids import NodeId
from skep.model.paths import PathPeer, ProbeTargets

KEPT = Kept(
    ProbeTargets(
        node=PathPeer(node_id=NodeId("me"), hostname="m", data_path="192.0.2.1"),
        peers=(PathPeer(node_id=NodeId("p"), hostname="h", control="192.0.2.2:2377"),),
    ),
    Measured({NodeId("p"): 1400}, {NodeId("p"): Said(1500, {7: 1400})}),
)


def test_what_is_kept_is_found_and_what_is_not_is_not(tmp_path: Path) -> None:
    file = tmp_path / "paths"
    assert load(file) is None
    save(file, KEPT)
    assert load(file) == KEPT
    save(file, None)
    save(file, None)
    assert load(file) is None


def test_what_cannot_be_read_counts_as_nothing(tmp_path: Path) -> None:
    file = tmp_path / "paths"
    for content in (b"", b"nonsense", b"\x90", b"\x81\xa4wish\x01"):
        file.write_bytes(content)
        assert load(file) is None
