"""What is committed of the ``.proto`` files is what they compile to."""

import os
from pathlib import Path

import pytest

from skep.protobuf.compile import PACKAGE, SETS, ProtoSet


@pytest.mark.parametrize("protos", SETS, ids=lambda protos: protos.directory.name)
def test_committed_descriptors_are_up_to_date(protos: ProtoSet, tmp_path: Path) -> None:
    protos.write_descriptors(tmp_path)
    written = (tmp_path / protos.descriptors).read_bytes()
    assert written == (protos.directory / protos.descriptors).read_bytes(), "run skep.protobuf.compile"


def test_stubs_are_written_when_a_file_has_changed(tmp_path: Path) -> None:
    proto = tmp_path / "small.proto"
    proto.write_text('syntax = "proto3";\nmessage Small { string name = 1; }\n')
    protos = ProtoSet(tmp_path, "small.binpb", tmp_path, ("small.proto",))
    assert protos.has_old_stubs()
    protos.write_stubs()
    assert "class Small" in (tmp_path / "small_pb2.pyi").read_text()
    assert not protos.has_old_stubs()
    later = proto.stat().st_mtime + 10
    os.utime(proto, (later, later))
    assert protos.has_old_stubs()


def test_no_file_is_left_out() -> None:
    compiled = {protos.root / proto for protos in SETS for proto in protos.protos}
    assert compiled == set(PACKAGE.rglob("*.proto"))
