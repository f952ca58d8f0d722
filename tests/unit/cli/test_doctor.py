"""What ``skep doctor network`` says."""

from typing import Any

from click import unstyle
from click.testing import CliRunner

from skep.cli import main as cli
from skep.cli.maintain.doctor import has_problem, is_too_early, shown, verdict
from skep.cli.output import Screen


def a_finding(
    check: str = "overlay", port: str = "4789/udp", *, fails: bool = False, **more: Any
) -> dict[str, Any]:
    loss = {"Sent": 3, "Lost": 3 if fails else 0, "Failing": fails}
    times = {} if fails else {"RoundTripMs": 0.42}
    return {"Check": check, "Port": port, **loss, **times, **more}


def a_path(peer: str, *findings: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"PeerID": f"id-{peer}", "Peer": peer, "Findings": list(findings or (a_finding(),)), **more}


def a_result(name: str, *paths: dict[str, Any], error: str = "") -> dict[str, Any]:
    return {"ID": f"id-{name}", "Hostname": name, "Paths": list(paths)} | ({"Error": error} if error else {})


WELL = [a_result("m1", a_path("w1", MTU=1500)), a_result("w1", a_path("m1", MTU=1500))]
BLOCKED = [
    a_result("m1", a_path("w1"), a_path("w2")),
    a_result("w1", a_path("m1"), a_path("w2", a_finding(fails=True, Detail="nothing came back"))),
    a_result("w2", a_path("m1"), a_path("w1", a_finding(fails=True, Detail="nothing came back"))),
]


def test_a_cluster_that_is_well_is_said_to_be() -> None:
    assert list(shown(WELL, Screen())) == [
        "2 nodes, 1 pair: no problems found",
        "",
        "FROM  TO  CHECK    LOSS  RTT     MTU   STATE",
        "m1    w1  1 check  0 %   0.4 ms  1500  ok",
        "w1    m1  1 check  0 %   0.4 ms  1500  ok",
    ]
    assert not any(map(has_problem, WELL))


def test_a_cluster_whose_nodes_do_not_know_each_other_yet_is_not_said_to_be_well() -> None:
    early = [a_result("m1"), a_result("w1")]
    assert (
        verdict(early)
        == "2 nodes, 0 pairs: the nodes do not know their peers yet, so try again in a few seconds"
    )
    assert is_too_early(early)
    assert not is_too_early([a_result("m1")])
    assert not is_too_early(WELL)


def test_what_fails_comes_first_with_pair_and_port() -> None:
    lines = list(shown(BLOCKED, Screen(has_colors=True)))
    assert lines[0] == "3 nodes, 3 pairs: 4789/udp (overlay) fails between w1 and w2"
    assert [line.split("  ")[0].strip() for line in lines[3:5]] == ["\x1b[31mw1\x1b[0m", "\x1b[31mw2\x1b[0m"]
    assert unstyle(lines[3]).startswith("w1    w2  overlay  4789/udp  100 %")
    assert lines[-2:] == ["Reasons:", "  w1 -> w2 and 1 more: overlay: nothing came back"]
    assert [has_problem(result) for result in BLOCKED] == [False, True, True]


def test_a_node_that_does_not_answer_is_named_with_why() -> None:
    results = [*WELL, a_result("w3", error="no response within 25 s")]
    assert verdict(results) == "3 nodes, 1 pair: no response from 1 node"
    assert list(shown(results, Screen()))[-2:] == [
        "Nodes without a response:",
        "  w3: no response within 25 s",
    ]
    assert has_problem(results[-1])


def test_in_a_large_cluster_only_what_fails_is_listed() -> None:
    names = [f"w{number}" for number in range(10)]
    results = [a_result(name, *(a_path(peer) for peer in names if peer != name)) for name in names]
    assert list(shown(results, Screen()))[2:] == [
        "90 paths without problems are hidden. Use --all to show them."
    ]
    assert len(list(shown([*BLOCKED, *results], Screen()))) == 9
    assert len(list(shown(results, Screen(), shows_all=True))) == 3 + 90


def test_every_check_is_shown_on_demand() -> None:
    two = [a_result("m1", a_path("w1", a_finding(), a_finding("control", "2377/tcp")))]
    rows = list(shown(two, Screen(), shows_all=True))[3:]
    assert [row.split()[2:4] for row in rows] == [["overlay", "4789/udp"], ["control", "2377/tcp"]]


def test_what_a_node_finds_of_its_own_names_is_no_pair() -> None:
    own = a_result("m1", a_path("m1", a_finding("names", "53/udp", fails=True, Detail="web is 10.0.0.9")))
    lines = list(shown([own], Screen()))
    assert lines[0] == "1 node, 0 pairs: 53/udp (names) fails on m1"
    assert "(itself)" in lines[3]
    assert lines[-1] == "  m1: names: web is 10.0.0.9"


def test_speed_is_shown_where_it_was_measured() -> None:
    lines = list(shown([a_result("m1", a_path("w1", Throughput=125_000_000))], Screen()))
    assert "1,000 Mbit/s" in lines[-1]


def test_the_way_between_nodes_is_shown_if_any_pair_has_a_tunnel() -> None:
    paths = [a_path("w1", Way="direct"), a_path("w2", Way="tunnel", MTU=1440), a_path("w3", Way="relay w1")]
    lines = list(shown([a_result("m1", *paths)], Screen()))
    assert lines[2:] == [
        "FROM  TO  CHECK    LOSS  RTT     MTU   WAY       STATE",
        "m1    w1  1 check  0 %   0.4 ms        direct    ok",
        "m1    w2  1 check  0 %   0.4 ms  1440  tunnel    ok",
        "m1    w3  1 check  0 %   0.4 ms        relay w1  ok",
    ]
    assert "WAY" not in list(shown([a_result("m1", paths[0])], Screen()))[2]


def test_the_help_has_examples() -> None:
    result = CliRunner().invoke(cli.main, ["doctor", "network", "--help"])
    assert result.exit_code == 0
    assert "skep doctor network --throughput" in result.output


def test_without_a_node_it_is_one_line() -> None:
    result = CliRunner().invoke(cli.main, ["-H", "unix:///nowhere.sock", "doctor", "network"])
    assert result.exit_code == 1
    assert result.output.startswith("Error: unix:///nowhere.sock does not answer")


def test_network_problems_of_a_node_are_problems() -> None:
    results = [WELL[0] | {"Conditions": ["the kernel's table of neighbors overflows"]}, WELL[1]]
    lines = list(shown(results, Screen()))
    assert lines[0] == "2 nodes, 1 pair: 1 node with problems"
    assert lines[-2:] == [
        "Problems reported by nodes:",
        "  m1: the kernel's table of neighbors overflows",
    ]
    assert [has_problem(result) for result in results] == [True, False]


def test_a_rootless_node_is_no_problem_and_no_reason_to_wait() -> None:
    rootless = a_result("r1") | {"Rootless": True}
    assert not has_problem(rootless)
    assert list(shown([*WELL, rootless], Screen()))[-2:] == [
        "Rootless nodes, which have no overlay networks:",
        "  r1",
    ]
    assert not is_too_early([a_result("m1"), rootless])
    assert is_too_early([a_result("m1"), a_result("w1"), rootless])
