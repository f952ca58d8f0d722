"""How a node encrypts: the first method that works, else a refusal; and what is said of the untested."""

import re
from pathlib import Path

import pytest

from skep.dataplane.encrypted import methods
from skep.dataplane.encrypted.methods import Refusal, chosen, label, refusal_for
from skep.model.pair_keys import ENCRYPTION_LABEL, Method
from skep.node.features import Features
from tests.test_status import exists

ROOT = Path(__file__).parents[4]
WIREGUARD_TEST = "tests/integration/node/test_encrypted_wireguard.py"


def without(**missing: str) -> Features:
    return Features(missing={name.replace("_", "-"): reason for name, reason in missing.items()})


def test_the_path_in_user_space_is_taken_where_wireguard_is_missing() -> None:
    assert chosen(without(wireguard="Unknown device type")) is Method.USER_SPACE


def test_wireguard_comes_first_once_it_has_passed_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "HAS_WIREGUARD_PASSED", True)
    assert chosen(Features()) is Method.WIREGUARD
    assert chosen(without(vxlan="Unknown device type")) is Method.USER_SPACE
    monkeypatch.setattr(methods, "HAS_WIREGUARD_PASSED", False)
    assert chosen(Features()) is Method.USER_SPACE
    assert chosen(Features(), wished=Method.WIREGUARD) is Method.WIREGUARD


def test_a_node_that_can_do_neither_refuses_with_the_reasons() -> None:
    method = chosen(
        without(wireguard="Unknown device type", encrypted_tap="/dev/net/tun: No such file or directory")
    )
    assert isinstance(method, Refusal)
    assert refusal_for("secure", method) == (
        "network secure is encrypted, and this node cannot encrypt overlay networks (wireguard: Unknown device type; "
        "encrypted-tap: /dev/net/tun: No such file or directory); nothing is sent in clear"
    )
    assert label(method) == {}


def test_a_method_that_is_wished_and_missing_is_not_replaced_by_another() -> None:
    method = chosen(without(wireguard="Unknown device type"), wished=Method.WIREGUARD)
    assert isinstance(method, Refusal)


def test_a_node_says_how_it_encrypts_and_refuses_nothing() -> None:
    assert label(Method.USER_SPACE) == {ENCRYPTION_LABEL: "aes-gcm"}
    assert refusal_for("secure", Method.USER_SPACE) == ""


# --- docs/untested.md -------------------------------------------------------------------------------------------

ROW = re.compile(r"^\| (?P<what>[^|]+) \| `(?P<test>[^`]+)` \| (?P<machine>[^|]+) \| (?P<date>[^|]+) \|$")


def untested() -> list[re.Match[str]]:
    lines = (ROOT / "docs" / "untested.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("| ") and not line.startswith(("| what", "| ---"))]
    rows = [ROW.match(line) for line in table]
    assert all(rows), "each row: what, `test`, machine, date"
    return [row for row in rows if row is not None]


def test_every_row_of_the_page_names_a_test_and_when_and_where_it_passed() -> None:
    rows = untested()
    assert rows
    for row in rows:
        assert exists(row["test"])
        if row["date"] == "never":
            assert row["machine"] == "none"
        else:
            assert re.fullmatch(r"20\d\d-\d\d-\d\d", row["date"])
            assert row["machine"] != "none"


def test_wireguard_is_chosen_by_itself_exactly_when_the_page_says_that_it_passed() -> None:
    rows = [row for row in untested() if row["test"].startswith(WIREGUARD_TEST)]
    assert rows
    assert all(row["date"] != "never" for row in rows) == methods.HAS_WIREGUARD_PASSED
