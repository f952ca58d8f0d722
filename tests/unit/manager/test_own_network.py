"""The interface that carries a manager's address."""

from skep.manager.own_network import OwnNetwork, interface_of


def test_the_loopback_interface_has_its_address_and_works() -> None:
    assert interface_of("127.0.0.1") == ("lo", True)


def test_an_address_that_no_interface_has_is_none_and_never_changes() -> None:
    assert interface_of("203.0.113.1") is None
    assert not OwnNetwork("203.0.113.1").changed()
    assert not OwnNetwork("::1").changed()


def test_a_network_that_stays_as_it_is_has_not_changed() -> None:
    assert not OwnNetwork("127.0.0.1").changed()
