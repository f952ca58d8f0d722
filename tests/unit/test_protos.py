"""What is committed of the ``.proto`` files is what they compile to."""

from pathlib import Path

import pytest

from skep.protobuf.compile import PACKAGE, SETS, ProtoSet


@pytest.mark.parametrize("protos", SETS, ids=lambda protos: protos.directory.name)
def test_committed_descriptors_and_stubs_are_up_to_date(protos: ProtoSet, tmp_path: Path) -> None:
    protos.compile_into(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {protos.descriptors, *(f"{Path(proto).stem}_pb2.pyi" for proto in protos.protos)}
    for name in names:
        assert (tmp_path / name).read_bytes() == (protos.directory / name).read_bytes(), (
            f"{name}: run skep.protobuf.compile"
        )


def test_no_file_is_left_out() -> None:
    compiled = {protos.root / proto for protos in SETS for proto in protos.protos}
    assert compiled == set(PACKAGE.rglob("*.proto"))
