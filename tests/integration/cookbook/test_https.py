"""A name with HTTPS: Caddy in front of nginx loses no request over updates and a new certificate."""

from pathlib import Path

import pytest

from tests.integration.cookbook.lab import Recipe, a_recipe
from tests.integration.networks.lab import asking, outside
from tests.support.machines.playground_rig import running, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.needs("debootstrap", "openssl")]

NAME = "shop.example.org"
ENOUGH = 50
"""Answers that show that clients were at work all the time."""

TEN = f"for _ in $(seq 10); do curl -sSk -m 2 --resolve {NAME}:443:$NODE https://{NAME}/ || echo failed; done"


def clients(recipe: Recipe, *words: str) -> tuple[Path, list[str]]:
    """Return clients of the name, which trust the certificates in ``trusted.pem``."""
    trusted = str(recipe.directory / "trusted.pem")
    url = f"https://{recipe.m1.description['addr']}:443/"
    return outside(recipe.cluster), [
        *("strict_client.py", "--ca", trusted, "--name", NAME, "--pause", "0.02", *words, url)
    ]


def serial(recipe: Recipe) -> str:
    """Return the serial number of the certificate that a proxy presents."""
    connect = f"openssl s_client -connect $NODE:443 -servername {NAME} </dev/null 2>/dev/null"
    return recipe.run(f"{connect} | openssl x509 -noout -serial").strip()


def proxies(recipe: Recipe) -> set[str]:
    return {task["ID"] for task in running(recipe.m1, "site_proxy")}


def test_a_name_with_https() -> None:
    with a_recipe("https") as recipe:
        recipe.next()  # a certificate
        recipe.run("cp cert.pem trusted.pem")
        assert recipe.next().endswith("version 1\n")
        assert recipe.next() == "308\n"
        with asking(clients(recipe)) as seen:
            assert recipe.next().endswith("version 2\n")
        assert seen.failed == []
        assert seen.count > ENOUGH

        former, before = serial(recipe), proxies(recipe)
        recipe.next()  # another certificate
        recipe.run("cat cert.pem >>trusted.pem")
        with asking(clients(recipe, "--fresh")) as seen:
            recipe.next()
        assert seen.failed == []
        assert seen.count > ENOUGH
        assert proxies(recipe).isdisjoint(before)
        assert serial(recipe) != former
        assert "site_web: 2 of 2 tasks run: healthy" in recipe.next()
        recipe.assert_complete()

        recipe.cluster.skep("kill", recipe.places("site_web")[0])
        wait_until(lambda: len(running(recipe.m1, "site_web")) == 2, "its tasks run elsewhere")
        wait_until(lambda: len(running(recipe.m1, "site_proxy")) == 2, "its proxies run elsewhere")
        wait_until(lambda: "failed" not in recipe.run(TEN), "the proxies have read the new addresses")
        with asking(clients(recipe, "--at-least", str(ENOUGH))) as seen:
            pass
        assert seen.failed == []
