"""Reading what a binary needs; the interpreter that runs the tests is the example."""

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis.strategies import binary, integers

from skep.playground.images import elf

PYTHON = Path(sys.executable).resolve().read_bytes()


def test_a_dynamic_program_names_its_loader_and_its_libraries() -> None:
    program = elf.read(PYTHON)
    assert program is not None
    assert "ld-" in program.interpreter
    assert "libc.so.6" in program.needed


def test_a_script_is_no_elf_file() -> None:
    assert elf.read(b"#!/bin/sh\n") is None


@given(position=integers(6, 4000), garbage=binary(min_size=1, max_size=64))
def test_a_damaged_file_is_refused_and_never_misread_as_something_else(position: int, garbage: bytes) -> None:
    """Whatever the header says: an answer or ValueError, no other error and no endless loop."""
    damaged = PYTHON[:position] + garbage + PYTHON[position + len(garbage) : 8192]
    try:
        elf.read(damaged)
    except ValueError:
        return


def test_a_cut_off_file_is_refused() -> None:
    with pytest.raises(ValueError, match="damaged"):
        elf.read(PYTHON[:80])
