import pytest

from skep.model.networks.addresses import host_of, joined, parted


@pytest.mark.parametrize(
    ("addr", "host", "port"),
    [("10.0.0.1:2377", "10.0.0.1", "2377"), ("[fd00::2]:2377", "fd00::2", "2377"), (":2377", "", "2377")],
)
def test_an_address_is_parted_into_host_and_port(addr: str, host: str, port: str) -> None:
    assert parted(addr) == (host, port)
    assert host_of(addr) == host


def test_of_nothing_there_is_neither_host_nor_port() -> None:
    assert parted("") == ("", "")


@pytest.mark.parametrize("addr", ["10.0.0.1:2377", "[fd00::2]:2377"])
def test_what_was_parted_is_joined_again(addr: str) -> None:
    assert joined(*parted(addr)) == addr
