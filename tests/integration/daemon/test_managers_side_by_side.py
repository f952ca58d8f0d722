"""Several managers on one machine, at neighboring ports of one address."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.support.machines.daemon_rig import DaemonRig, daemon_rig, wait_until
from tests.support.machines.directories import a_directory

PORTS = (2477, 2478, 2479)


@pytest.fixture
def machine() -> Iterator[tuple[DaemonRig, DaemonRig, DaemonRig]]:
    """Three daemons in one network namespace."""
    with ExitStack() as stack:
        made: list[DaemonRig] = []
        for _ in PORTS:
            directory = stack.enter_context(a_directory("skep-"))
            rig = stack.enter_context(daemon_rig(directory, made[0] if made else None))
            rig.start()
            made.append(rig)
        yield made[0], made[1], made[2]


def join(rig: DaemonRig, first: DaemonRig, port: int) -> None:
    body = {
        "ListenAddr": f"127.0.0.1:{port}",
        "AdvertiseAddr": f"127.0.0.1:{port}",
        "RemoteAddrs": [f"127.0.0.1:{PORTS[0]}"],
        "JoinToken": first.get("/swarm")[1]["JoinTokens"]["Manager"],
    }
    assert rig.ask("POST", "/swarm/join", body) == (200, "")


def reachable(seen_by: DaemonRig) -> set[str]:
    """The addresses of the managers that are reachable."""
    status, nodes = seen_by.get("/nodes")
    managers = [node["ManagerStatus"] for node in nodes] if status == 200 else []
    return {one["Addr"] for one in managers if one["Reachability"] == "reachable"}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_three_managers_listen_at_neighboring_ports_of_one_address(
    machine: tuple[DaemonRig, DaemonRig, DaemonRig],
) -> None:
    first, *others = machine
    addresses = {f"127.0.0.1:{port}" for port in PORTS}
    init = {"ListenAddr": f"127.0.0.1:{PORTS[0]}", "AdvertiseAddr": f"127.0.0.1:{PORTS[0]}"}
    assert first.ask("POST", "/swarm/init", init)[0] == 200
    for rig, port in zip(others, PORTS[1:], strict=True):
        join(rig, first, port)
    for rig in machine:
        wait_until(lambda rig=rig: reachable(rig) == addresses, "all managers are reachable", 60)
    assert [rig.swarm()["PeerAddr"] for rig in machine] == [f"127.0.0.1:{port + 10_000}" for port in PORTS]
    assert not any("TCP port" in text for rig in machine for text in rig.swarm().get("Warnings", ()))
    for rig in machine:
        rig.stop()
    for rig in machine:
        rig.start()
    for rig in machine:
        wait_until(lambda rig=rig: reachable(rig) == addresses, "all managers are back", 60)
    secret = {"Name": "kept", "Data": "YQ==", "Labels": {}}
    assert others[1].ask("POST", "/secrets/create", secret)[0] == 201


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_manager_keeps_the_peer_port_of_an_earlier_version(rig: DaemonRig) -> None:
    """Then it was the port after the manager's, and the others know it by that."""
    rig.toml.write_text('peer-addr = "127.0.0.1:2478"\n')
    rig.start()
    init = {"ListenAddr": "127.0.0.1:2477", "AdvertiseAddr": "127.0.0.1:2477"}
    assert rig.ask("POST", "/swarm/init", init)[0] == 200
    rig.toml.write_text("")
    rig.stop()
    rig.start()
    wait_until(lambda: reachable(rig) == {"127.0.0.1:2477"}, "it manages", 60)
    assert rig.swarm()["PeerAddr"] == "127.0.0.1:2478"
    labels = rig.get("/info")[1].get("Labels") or []
    assert not any("TCP port" in text for text in rig.swarm().get("Warnings", ()))
    assert all("12477" not in label for label in labels)
