"""The state that one process saves for the next."""

from pathlib import Path

import msgspec

from skep.dataplane.probe.measurements import Measurements
from skep.dataplane.probe.packets import PeerMeasurements
from skep.dataplane.probe.prober import SavedState, load_state, save_state
from skep.model.networks.paths import PathPeer, ProbeTargets
from skep.model.values.ids import NodeId

STATE = SavedState(
    ProbeTargets(
        node=PathPeer(node_id=NodeId("me"), hostname="m", data_path="192.0.2.1"),
        peers=(PathPeer(node_id=NodeId("p"), hostname="h", control="192.0.2.2:2377"),),
    ),
    Measurements({NodeId("p"): 1400}, {NodeId("p"): PeerMeasurements(1500, {7: 1400})}),
)


def test_saved_state_is_loaded_until_it_is_removed(tmp_path: Path) -> None:
    file = tmp_path / "paths"
    assert load_state(file) is None
    save_state(file, STATE)
    assert load_state(file) == STATE
    save_state(file, None)
    save_state(file, None)
    assert load_state(file) is None


def test_an_unreadable_file_counts_as_none(tmp_path: Path) -> None:
    file = tmp_path / "paths"
    for content in (b"", b"nonsense", b"\x90", b"\x81\xa7targets\x01"):
        file.write_bytes(content)
        assert load_state(file) is None


def test_the_names_in_the_file_stay(tmp_path: Path) -> None:
    save_state(tmp_path / "paths", STATE)
    written = msgspec.msgpack.decode((tmp_path / "paths").read_bytes())
    assert set(written) == {"targets", "measured"}
    assert written["measured"] == {"own": {"p": 1400}, "said": {"p": {"mtu": 1500, "lower": {7: 1400}}}}
