"""Frames of HTTP/2."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.rpc import frames
from skep.rpc.frames import Frame, Violation

SOME = st.lists(
    st.builds(
        Frame, st.integers(0, 9), st.integers(0, 255), st.integers(0, 2**31 - 1), st.binary(max_size=50)
    )
)


@given(SOME, st.data())
def test_frames_are_the_same_wherever_the_stream_is_cut(sent: list[Frame], data: st.DataObject) -> None:
    stream = b"".join(frames.frame(*frame) for frame in sent)
    came: list[Frame] = []
    rest = b""
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        part, stream = stream[:size], stream[size:]
        taken, rest = frames.split(rest + part)
        came += taken
    assert came == sent
    assert rest == b""


def test_a_frame_longer_than_agreed_is_a_violation() -> None:
    with pytest.raises(Violation):
        frames.split(frames.frame(frames.DATA, 0, 1, bytes(frames.FRAME_BYTES + 1)))


def test_padding_and_priority_are_no_content() -> None:
    padded = Frame(frames.DATA, 0x8, 1, b"\x03" + b"content" + bytes(3))
    assert frames.content(padded) == b"content"
    both = Frame(frames.HEADERS, 0x8 | 0x20, 1, b"\x02" + bytes(5) + b"block" + bytes(2))
    assert frames.content(both) == b"block"


@pytest.mark.parametrize("payload", [b"", b"\x05abc"])
def test_more_padding_than_there_is_is_a_violation(payload: bytes) -> None:
    with pytest.raises(Violation):
        frames.content(Frame(frames.DATA, 0x8, 1, payload))
