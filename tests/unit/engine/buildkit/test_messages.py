"""The committed messages of BuildKit's protocols are those of their ``.proto`` file."""

from pathlib import Path

from skep.engine.buildkit.compile import DESCRIPTORS, HERE, STUB, compile_into


def test_the_committed_descriptors_and_stubs_are_up_to_date(tmp_path: Path) -> None:
    compile_into(tmp_path)
    for name in (DESCRIPTORS, STUB):
        assert (tmp_path / name).read_bytes() == (HERE / name).read_bytes(), (
            f"{name}: run skep.engine.buildkit.compile"
        )
