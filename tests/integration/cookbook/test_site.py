"""A site behind the front door: under load it loses its address's node, updates, and takes a bad version back."""

import json
from ipaddress import ip_address
from pathlib import Path

import pytest

from tests.integration.cookbook.lab import Recipe, a_recipe
from tests.integration.networks.lab import asking, outside
from tests.integration.networks.test_failover_addresses import holders
from tests.support.machines.playground_rig import running, wait_running, wait_until
from tests.support.security.pebble import PebbleAtSwitch, pebble_in

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.needs("debootstrap", "curl", "pebble", "pebble-challtestsrv"),
]

NAME = "shop.example.org"
ENOUGH = 1000
"""Answers that show that clients were at work all the time."""
BAD_SHARE = 0.05
"""Largest share of requests that a canary's first step may lose."""
STEP_TIME = "1s"
"""Steps with bounds last longer, until their requests have been judged."""


class Site(Recipe):
    """The recipe with an address for its clients, which trust the test's authority."""

    address: str
    pebble: PebbleAtSwitch

    def clients(self, number: int = 3) -> list[tuple[Path, list[str]]]:
        words = ["strict_client.py", "--ca", str(self.pebble.issuer), "--name", NAME, "--pause", "0.01"]
        return [(outside(self.cluster), [*words, f"https://{self.address}:443/"])] * number

    def next(self, **environment: str) -> str:
        return super().next(FREE_ADDRESS=self.address, STEP_TIME=STEP_TIME, **environment)


def end_of_certificate(site: Site) -> str:
    found = json.loads(site.run("skep certificate ls -o json"))["Certificates"]
    return str(found[0].get("NotAfter", "")) if found else ""


def test_a_site_behind_the_front_door() -> None:
    with a_recipe("site", workers=3, packages=["haproxy"]) as recipe:
        site = Site(recipe.cluster, "site", recipe.directory)
        site.address = str(ip_address(site.m1.description["addr"]) + 80)
        site.next()
        wait_running(site.m1, "skep-door", 3, within_s=90)
        switch = f"{site.address.rpartition('.')[0]}.1"
        with pebble_in(outside(site.cluster), switch, site.address, site.directory) as site.pebble:
            authority = f"--directory {site.pebble.directory} --roots {site.pebble.own_roots}"
            site.blocks[1] = f"{site.blocks[1].strip()} {authority}\n"
            site.next()
            wait_until(lambda: bool(end_of_certificate(site)), "it has a certificate", within_s=90)
            trusting = f'curl() {{ command curl --cacert {site.pebble.issuer} --retry 10 --retry-all-errors "$@"; }}\n'
            site.blocks[2] = trusting + site.blocks[2]
            assert site.next().endswith("version 1\n")
            lose_the_holder(site)
            with asking(*site.clients()) as seen:
                site.next()  # version 2
                renew(site)
            assert seen.failed == []
            assert seen.count > ENOUGH
            with asking(*site.clients()) as seen:
                said = site.next()  # version 3, which is bad
            assert "requests to new tasks failed" in said
            assert 0 < len(seen.failed) < BAD_SHARE * seen.count
            assert all(": 500 " in one for one in seen.failed)
            assert NAME in site.next()
            site.assert_complete()


def lose_the_holder(site: Site) -> None:
    """Kill the node that holds the address: only requests that were open there may fail."""
    (holder,) = holders(site.cluster, site.address)
    clients = site.clients()
    with asking(*clients) as seen:
        wait_until(lambda: bool(running(site.m1, "site_web")), "it runs")
        site.cluster.skep("kill", holder)
        wait_until(lambda: holders(site.cluster, site.address) not in ([], [holder]), "another node has it")
        site.run(
            f"curl -sS --cacert {site.pebble.issuer} --resolve {NAME}:443:{site.address} https://{NAME}/"
        )
    assert len(seen.failed) <= 2 * len(clients), "one open request of each client"
    site.cluster.skep("start", holder)
    wait_running(site.m1, "skep-door", 3, within_s=90)


def renew(site: Site) -> None:
    before = end_of_certificate(site)
    site.run(f"skep certificate renew {NAME}")
    wait_until(lambda: end_of_certificate(site) > before, "another certificate", within_s=90)
