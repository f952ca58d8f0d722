"""``skep cluster address``: what it shows, and which options it refuses."""

import pytest
from click.testing import CliRunner

from skep.cli.cluster.address import listed
from skep.cli.main import main
from skep.cli.output import Screen

HELD = {
    "Address": "10.0.0.100/24",
    "State": "held",
    "Hostname": "w1",
    "Since": "2026-11-28T09:51:28.5Z",
    "Reason": "",
}
UNHELD = {"Address": "fd00::100/64", "State": "unheld", "Hostname": "", "Reason": "no active node runs it"}


def test_addresses_are_listed_with_their_nodes() -> None:
    head, held, unheld = listed([HELD, UNHELD]).lines(Screen())
    assert head.split() == ["ADDRESS", "STATE", "NODE", "TAKEN", "REASON"]
    assert held.split() == ["10.0.0.100/24", "held", "w1", "2026-11-28", "09:51:28"]
    assert unheld.split()[:4] == ["fd00::100/64", "unheld", "-", "-"]
    assert unheld.endswith("no active node runs it")


def test_no_addresses() -> None:
    assert list(listed([]).lines(Screen())) == ["No failover addresses."]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--remove"], "--remove needs an address"),
        (["--interface", "eth0"], "--interface needs an address"),
        (["--remove", "--interface", "eth0", "10.0.0.1"], "exclude each other"),
    ],
)
def test_options_that_do_not_fit_together(words: list[str], text: str) -> None:
    done = CliRunner().invoke(main, ["--host", "unix:///nowhere", "cluster", "address", *words])
    assert (done.exit_code, text in done.output) == (2, True)
