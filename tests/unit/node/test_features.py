"""What a machine that lacks something says about it."""

from skep.node.host.features import Features, labels, warnings

WHOLE = Features(controllers=frozenset({"memory", "cpu", "pids"}), open_files_max=1 << 20)


def test_a_machine_that_can_everything_says_nothing() -> None:
    assert warnings(WHOLE) == ()
    assert labels(WHOLE) == {}


def test_what_is_missing_is_a_warning_with_its_consequence_and_a_label() -> None:
    poor = Features(missing={"vxlan": "Operation not supported", "wireguard": "Unknown device type"})
    words = ("missing.vxlan", "missing.wireguard", "without.vxlan", "without.wireguard")
    assert labels(poor) == {f"skep.{word}": "true" for word in words}
    reported = warnings(poor)
    assert reported[0] == (
        "WARNING: No vxlan support (Operation not supported): overlay networks do not reach other nodes"
    )
    assert not any("wireguard" in sentence for sentence in reported), "used only when asked for"


def test_limits_that_cannot_be_set_are_named() -> None:
    poor = Features(
        controllers=frozenset({"cpu"}), capabilities_missing=("CAP_SYS_RESOURCE",), open_files_max=1024
    )
    text = "\n".join(warnings(poor))
    assert "No memory cgroup controller" in text
    assert "No pids cgroup controller" in text
    assert "No cpu" not in text
    assert "without CAP_SYS_RESOURCE" in text
    assert "At most 1024 open files" in text
