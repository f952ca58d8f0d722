import pytest

from skep.errors import InvalidArgument
from skep.wire.client import split_address


@pytest.mark.parametrize(
    ("address", "expected"),
    [("10.0.0.1:2377", ("10.0.0.1", 2377)), ("[::1]:2377", ("::1", 2377)), ("host:1", ("host", 1))],
)
def test_an_address_has_a_host_and_a_port(address, expected):
    assert split_address(address) == expected


@pytest.mark.parametrize(
    "address", ["", "10.0.0.1", ":2377", "host:", "host:0", "host:65536", "host:-1", "host:²"]
)
def test_anything_else_is_no_address(address):
    with pytest.raises(InvalidArgument, match="invalid address"):
        split_address(address)
