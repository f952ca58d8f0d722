"""What the page of a fault run says, and which requests count as promised."""

from bench.day import Report
from bench.day_stacks import STACKS, Asked, Customers, a_stack


def customers() -> Customers:
    return Customers(list, list)


def test_a_request_is_promised_if_it_was_when_it_began_and_when_it_ended() -> None:
    quiet, lost = ("quiet", True), ("a machine is lost", False)
    found = customers()
    found.note(quiet, quiet, "")
    found.note(quiet, lost, "web at m1: timed out")
    found.note(lost, quiet, "web at m1: timed out")
    assert found.asked == {quiet: Asked(1, 0), lost: Asked(2, 2)}
    assert found.broken == []
    found.note(quiet, quiet, "web at w1: refused")
    assert found.asked[quiet] == Asked(2, 1)
    assert found.broken[0].endswith("quiet: web at w1: refused")


def test_the_page_has_the_outcome_what_happened_requests_and_memory() -> None:
    report = Report(title="4 minutes, seed 1", outcome="It ended early: x")
    report.add("scale", 2.0)
    report.add("scale", 3.5)
    report.memory.append("leader: 60.0 MiB")
    asked = {("scale", True): Asked(10, 1), ("a machine is lost", False): Asked(5, 4)}
    page = report.page(asked, ["00:00:01 scale: web: refused"], 7)
    assert page.startswith(
        "# Fault run: 4 minutes, seed 1\n\n**It ended early: x**\n\n10 promised requests, 1 failed; 7"
    )
    for line in (
        "| scale | 2 | 3.5 s |",
        "| scale | yes | 10 | 1 |",
        "| a machine is lost | no | 5 | 4 |",
        "* 00:00:01 scale: web: refused",
        "* leader: 60.0 MiB",
    ):
        assert line in page.splitlines()


def test_every_second_stack_is_encrypted_and_each_has_a_port_of_its_own() -> None:
    stacks = [a_stack(number) for number in range(STACKS)]
    assert sum("driver_opts" in one["networks"]["net"] for one in stacks) == STACKS // 2
    assert len({one["services"]["web"]["ports"][0]["published"] for one in stacks}) == STACKS
