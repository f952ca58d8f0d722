"""Probe messages as bytes."""

from hypothesis import given
from hypothesis import strategies as st

from skep.dataplane.probe.packets import (
    PAIRS_MAX,
    REQUEST_BYTES_MIN,
    PeerMeasurements,
    decode_request,
    decode_response,
    encode_request,
    encode_response,
)

NONCES = st.integers(0, 2**64 - 1)
MTUS = st.integers(0, 2**16 - 1)
MEASUREMENTS = st.builds(
    PeerMeasurements, MTUS, st.dictionaries(st.integers(0, 2**32 - 1), MTUS, max_size=60)
)


@given(NONCES, st.integers(0, 9000))
def test_requests_have_the_size_under_test(nonce: int, size: int) -> None:
    datagram = encode_request(nonce, size)
    assert len(datagram) == max(size, REQUEST_BYTES_MIN)
    assert decode_request(datagram) == nonce
    assert decode_response(datagram) is None


@given(NONCES, MEASUREMENTS)
def test_responses_are_complete_and_shorter_than_any_request(
    nonce: int, measurements: PeerMeasurements
) -> None:
    datagram = encode_response(nonce, measurements)
    assert len(datagram) <= REQUEST_BYTES_MIN
    assert decode_request(datagram) is None
    found = decode_response(datagram)
    assert found is not None
    if len(measurements.lower) <= PAIRS_MAX:
        assert found == (nonce, measurements)
    for address, mtu in measurements.lower.items():  # what does not fit is covered by the device's
        assert min(found[1].mtu, found[1].lower.get(address, 2**16)) <= mtu


@given(st.binary(max_size=400))
def test_other_datagrams_are_not_decoded(garbage: bytes) -> None:
    assert decode_request(garbage) is None or garbage.startswith(b"skpp\x01\x01")
    assert decode_response(garbage) is None or garbage.startswith(b"skpp\x01\x02")


@given(NONCES, MEASUREMENTS, st.integers(1, 255))
def test_truncated_responses_are_not_decoded(nonce: int, measurements: PeerMeasurements, cut: int) -> None:
    assert decode_response(encode_response(nonce, measurements)[:-cut]) is None
