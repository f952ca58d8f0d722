"""Which WireGuard a node uses: as configured, else the first that works, else a refusal."""

import pytest

from skep.dataplane.wireguard.methods import EncryptionRefusal, choose, reasons_for_fallback
from skep.model.networks.wireguard import EncryptionMethod
from skep.node.host.features import Features

NO_KERNEL, NO_GO = "Unknown device type", "wireguard-go is not installed"


def without(**missing: str) -> Features:
    return Features(missing={name.replace("_", "-"): reason for name, reason in missing.items()})


@pytest.mark.parametrize(
    ("features", "setting", "expected"),
    [
        (Features(), "auto", EncryptionMethod.KERNEL),
        (without(wireguard=NO_KERNEL), "auto", EncryptionMethod.USER_SPACE),
        (without(wireguard_go=NO_GO), "auto", EncryptionMethod.KERNEL),
        (Features(), "wireguard-go", EncryptionMethod.USER_SPACE),
        (without(tun="no such file"), "kernel", EncryptionMethod.KERNEL),
    ],
)
def test_the_first_method_that_works_is_taken(
    features: Features, setting: str, expected: EncryptionMethod
) -> None:
    assert choose(features, setting) is expected


def test_a_node_that_can_do_neither_refuses_with_all_reasons() -> None:
    method = choose(without(wireguard=NO_KERNEL, wireguard_go=NO_GO))
    assert method == EncryptionRefusal(
        f"this node cannot encrypt overlay networks (wireguard: {NO_KERNEL}; wireguard-go: {NO_GO})"
    )


@pytest.mark.parametrize("setting", ["kernel", "wireguard-go"])
def test_a_method_that_is_configured_and_missing_is_not_replaced_by_the_other(setting: str) -> None:
    lacking = without(wireguard=NO_KERNEL) if setting == "kernel" else without(wireguard_go=NO_GO)
    assert isinstance(choose(lacking, setting), EncryptionRefusal)


@pytest.mark.parametrize("missing", ["vxlan", "ipv6"])
def test_both_need_vxlan_and_ipv6(missing: str) -> None:
    assert isinstance(choose(without(**{missing: "not there"})), EncryptionRefusal)


def test_why_it_is_not_the_kernels_is_shown() -> None:
    refused = without(wireguard="Operation not permitted")
    assert choose(refused) is EncryptionMethod.USER_SPACE
    assert reasons_for_fallback(refused) == "wireguard: Operation not permitted"
    assert reasons_for_fallback(refused, "wireguard-go") == "", "as configured"
    assert reasons_for_fallback(Features()) == ""
    assert reasons_for_fallback(without(vxlan="not there")) == "", "a refusal has its reasons"
