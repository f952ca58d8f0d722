"""What ``skep stack quota set`` sends, and what it makes of a manager that does not know all of it."""

import pytest

from skep.cli.stack.stack_quota import _body, _check_is_set, _shown
from skep.errors import FailedPrecondition

NONE = {"tasks": 0, "ports": 0, "networks": 0, "addresses": 0, "secrets": 0, "configs": 0, "services": 0}


def test_bounds_that_are_not_given_are_not_sent_to_older_managers():
    assert _body(cpus=0.5, memory="1g", data="0", **NONE | {"tasks": 3}) == {
        "Tasks": 3,
        "NanoCPUs": 500_000_000,
        "MemoryBytes": 1 << 30,
        "Ports": 0,
    }
    body = _body(cpus=0, memory="0", data="64m", **NONE | {"networks": 2, "addresses": 512})
    assert (body["Networks"], body["Addresses"], body["DataBytes"]) == (2, 512, 64 << 20)


def test_hosts_are_sent_and_shown() -> None:
    body = _body(cpus=0, memory="0", data="0", hosts=("Shop.example",), **NONE)
    assert body["Hosts"] == ["shop.example"]
    with pytest.raises(FailedPrecondition, match="does not support the limits Hosts"):
        _check_is_set(body, {"Quota": {}})
    found = {"Used": {"Hosts": ["www.shop.example"]}, "Quota": {"Hosts": ["shop.example", "*.shop.example"]}}
    assert (_shown(found).rows or ())[-1] == {
        "Resource": "hosts",
        "Used": "www.shop.example",
        "Limit": "shop.example, *.shop.example",
    }


def test_sizes_have_units() -> None:
    found = {
        "Used": {"Tasks": 20, "NanoCPUs": 500_000_000, "DataBytes": 1159},
        "Quota": {"MemoryBytes": 8 << 30},
    }
    rows = {row["Resource"]: (row["Used"], row["Limit"]) for row in _shown(found).rows or ()}
    assert (rows["tasks"], rows["reserved CPUs"]) == (("20", "-"), ("0.5", "-"))
    assert (rows["reserved memory"], rows["data of secrets and configs"]) == (
        ("0 B", "8 GiB"),
        ("1.1 KiB", "-"),
    )


def test_a_bound_that_an_older_manager_has_dropped_is_an_error():
    body = _body(cpus=0, memory="0", data="0", **NONE | {"tasks": 3, "networks": 2})
    _check_is_set(body, {"Quota": {"Tasks": 3, "Networks": 2}})
    with pytest.raises(FailedPrecondition, match="does not support the limits Networks"):
        _check_is_set(body, {"Quota": {"Tasks": 3}})
