"""The dashboard in Chromium, on a cluster made up for it: what one sees, what arrives, what is sent."""

import random
import re
from typing import Any

import pytest
from playwright.async_api import Page, expect

from tests.browser.made_up_cluster import KINDS, MadeUpCluster, make
from tests.browser.served_cluster import served
from tests.support.clients.browser import a_browser, a_page, open_place

pytestmark = pytest.mark.chromium

HOSTILE = "<img src=x onerror=alert(1)>\u202e<script>alert(2)</script>"


async def test_what_is_behind_the_lists() -> None:
    """Ports of nodes, load over time, paths between nodes, revisions, volumes of nodes, versions."""
    cluster = make(5, 24)
    service = list(cluster.rows["services"].values())[1]
    node = next(iter(cluster.rows["nodes"].values()))
    user = next(task for task in cluster.tasks_of(service["id"]) if task["slot"] == 1)
    user |= {"node": node["id"], "state": "running", "desired_state": "running"}
    node["volumes"].append(node["volumes"][0] | {"name": "left_data", "slot": 999})
    async with served(cluster) as url, a_browser() as browser, a_page(browser) as page:
        await page.goto(f"{url}#/services")
        await expect(page.get_by_role("row", name=service["name"])).to_contain_text(
            "32768, 32769→9000 (host)"
        )
        await page.goto(f"{url}#/networks")
        reach = page.get_by_label("Paths between nodes")
        await expect(reach).to_contain_text("2 paths fail")
        await expect(reach).to_contain_text("m1 → m2 4789/udp (overlay)")
        await reach.get_by_role("button", name="Probe now").click()
        await expect(reach).to_contain_text("all respond, slowest round trip 1.5 ms")
        await page.goto(f"{url}#/stacks/stacks/shop")
        await expect(page.locator("aside")).to_contain_text(
            "failed: service shop_api: task: non-zero exit (1)"
        )
        await expect(page.locator("aside")).to_contain_text("2 created, 2 updated")
        await page.goto(f"{url}#/volumes")
        await expect(page.get_by_role("heading", name="Cluster volumes")).to_be_visible()
        row = page.get_by_role("row", name=f"{service['name']}_data")
        await expect(row).to_contain_text(f"{service['name']}.1")
        await expect(row).to_contain_text("in use")
        await expect(page.get_by_role("row", name="left_data")).to_contain_text("50 min ago")
        await page.goto(f"{url}#/secrets")
        await expect(page.get_by_role("heading", name="Secrets and configs")).to_be_visible()
        await expect(page.get_by_role("row", name="tls-key-2")).to_contain_text("2 of 2")
        await page.goto(f"{url}#/nodes/nodes/{next(iter(cluster.rows['nodes']))}")
        await page.evaluate(
            "[5, 4, 3, 2, 1, 0].forEach((i) => skep.samples.take(skep.cluster, Date.now() - i * 10_001))"
        )
        await page.evaluate("skep.invalidate()")
        await expect(page.locator("aside .chart.large .line").first).to_have_attribute(
            "d", re.compile("M.*L.*L")
        )
        await expect(page.locator("aside")).to_contain_text("% since")
        await expect(page.locator("aside")).to_contain_text("Unreachable nodes")


async def test_routes_have_their_requests_shares_and_certificates() -> None:
    cluster = make(5, 24)
    service = cluster.routes[1]["ServiceID"]
    async with served(cluster) as url, a_browser() as browser, a_page(browser) as page:
        await open_place(page, url, "routes")
        rows = page.get_by_role("table", name="Routes").locator("tbody tr")
        await expect(rows).to_have_count(3)
        for words in ("1\u202f285", "0\u00a0%", "4.2\u00a0ms", "31\u00a0ms", "240\u00a0ms", "ok", "73 d"):
            await expect(rows.nth(0)).to_contain_text(words)
        for words in ("3.4", "7.5\u00a0%", "2.4\u00a0s", "over\u00a010\u00a0s", "5\u00a0%"):
            await expect(rows.nth(1)).to_contain_text(words)
        await expect(rows.nth(2)).to_contain_text("no task of the service runs")
        await rows.nth(1).get_by_role("link").first.click()
        panel = page.locator("aside")
        await expect(panel).to_contain_text("3.4 requests/s, 7.5\u00a0% failed, median 180\u00a0ms")
        await expect(panel).to_contain_text("5\u00a0% of new connections to new tasks")
        await open_place(page, url, f"services/services/{service}")
        await expect(panel.get_by_role("heading", name="Requests")).to_be_visible()


async def test_a_cluster_is_seen_searched_changed_and_scaled() -> None:
    cluster = make(5, 24)
    cluster.then = make(2, 6).snapshot()
    async with served(cluster) as url, a_browser() as browser, a_page(browser) as page:
        await page.goto(url)
        await expect(page.get_by_role("application")).to_have_attribute(
            "aria-label", _starts("Map of 5 nodes with 24 tasks")
        )
        await expect(page.locator(".live")).to_have_text("live")
        assert await _drawn_colours(page) > 3
        await _sees_a_change(page, cluster)
        await _goes_back(page)
        await _finds_by_address(page, cluster)
        await _scales(page, cluster)


async def _sees_a_change(page: Page, cluster: MadeUpCluster) -> None:
    service = next(iter(cluster.rows["services"].values()))
    cluster.kill(cluster.tasks_of(service["id"])[0]["node"])
    await expect(page.locator(".attention")).to_contain_text("is down")
    await expect(page.get_by_role("application")).to_have_attribute(
        "aria-label", _contains("1 node not ready")
    )
    cluster.heal()
    await expect(page.locator(f".services a[href$='{service['id']}']")).to_have_text(
        f"{service['desired']}/{service['desired']}"
    )


async def _goes_back(page: Page) -> None:
    map = page.get_by_role("application")
    await page.get_by_role("slider", name="Time shown").focus()
    await page.keyboard.press("PageDown")
    await expect(map).to_have_attribute("aria-label", _starts("Map of 2 nodes"))
    await expect(page.locator(".banner.past")).to_contain_text("This is the cluster at")
    await page.get_by_role("button", name="Back to now").click()
    await expect(map).to_have_attribute("aria-label", _starts("Map of 5 nodes"))


async def _finds_by_address(page: Page, cluster: MadeUpCluster) -> None:
    node = list(cluster.rows["nodes"].values())[2]
    await page.keyboard.press("/")
    await page.keyboard.type(node["address"])
    await expect(page.get_by_role("option").first).to_contain_text(node["name"])
    await page.keyboard.press("Enter")
    await expect(page.locator("aside h2")).to_have_text(node["name"])


async def _scales(page: Page, cluster: MadeUpCluster) -> None:
    service = next(iter(cluster.rows["services"].values()))
    await page.goto(f"{page.url.partition('#')[0]}#/services/services/{service['id']}")
    await page.get_by_role("button", name="Scale", exact=True).click()
    dialog = page.get_by_role("dialog", name=f"Scale {service['name']}")
    confirm = dialog.get_by_role("button", name="Scale")
    await expect(confirm).to_be_disabled()
    await dialog.get_by_label("Replicas").fill(str(service["desired"] + 8))
    await expect(dialog.locator(".preview li.more").first).to_contain_text("→")
    assert all(path.startswith("/skep/services/placement") for _, path, _ in cluster.requests)
    await confirm.click()
    await expect(dialog).to_be_hidden()
    method, path, body = cluster.requests[-1]
    assert (method, path) == ("POST", f"/services/{service['id']}/update?version=1")
    assert body["Mode"] == {"Replicated": {"Replicas": service["desired"] + 8}}
    assert body["TaskTemplate"]["ContainerSpec"]["Image"] == service["image"]
    await page.get_by_role("button", name="Scale", exact=True).click()
    await dialog.get_by_label("Replicas").fill(str(service["desired"] + 9))
    await expect(dialog.locator(".preview li.more").first).to_contain_text("→")
    sent = len(cluster.requests)
    service["desired"] += 1  # another user scales it
    await confirm.click()
    await expect(dialog.get_by_role("alert")).to_contain_text("has changed since this dialog was opened")
    assert cluster.requests[sent:] == []
    service["desired"] -= 1
    await dialog.get_by_role("button", name="Cancel").click()
    await expect(dialog).to_be_hidden()


async def test_hostile_text_is_shown_and_does_nothing() -> None:
    cluster = make(3, 8)
    cluster.lines = [f"\x1b[31m{HOSTILE}"]
    _make_hostile(cluster)
    task = next(iter(cluster.rows["tasks"]))
    service = next(iter(cluster.rows["services"]))
    async with served(cluster) as url, a_browser() as browser, a_page(browser) as page:
        for place in (
            *("hive", "services", "nodes", "tasks", "networks", "stacks", "volumes", "secrets", "events"),
            *(f"{kind}/{kind}/{next(iter(cluster.rows[kind]))}" for kind in KINDS),
            *(f"services/services/{service}/tasks", f"tasks/tasks/{task}/logs"),
        ):
            await page.goto(f"{url}#/{place}")
            await expect(page.locator("main")).not_to_be_empty()
            if place != "hive":
                await expect(page.locator("body")).to_contain_text("onerror=alert(1)")
            assert await page.locator("img, main script, aside script, [onerror]").count() == 0
            assert "\u202e" not in (await page.content())
        await expect(page.locator(".logs .lines div").first).to_contain_text(
            "<img src=x onerror=alert(1)>\ufffd<script>"
        )
        await page.goto(f"{url}#/hive")
        await page.get_by_role("application").focus()
        await page.keyboard.press("ArrowRight")
        await expect(page.locator(".tip")).to_contain_text("onerror")
        await page.keyboard.press("/")
        await page.keyboard.type("img")
        await expect(page.get_by_role("option").first).to_contain_text("<img")


def _make_hostile(cluster: MadeUpCluster) -> None:
    def spoiled(value: Any, name: str = "") -> Any:
        match value:
            case str() if name in (
                "name",
                "error",
                "message",
                "reason",
                "image",
                "driver",
                "engine",
                "address",
            ):
                return f"{value}{HOSTILE}"
            case dict():
                return {key: spoiled(one, str(key)) for key, one in value.items()}
            case _:
                return value

    for rows in cluster.rows.values():
        rows.update({id: spoiled(row) for id, row in rows.items()})
        for row in rows.values():
            if "labels" in row:
                row["labels"] = {HOSTILE: HOSTILE}
    for entry in cluster.history:
        entry["Message"] += HOSTILE


FRAGMENTS = (
    *(
        "<script>hit=1</script>",
        "<img src=x onerror=hit=1>",
        "<svg/onload=hit=1>",
        "</title><style>*{display:none}",
    ),
    *(
        "javascript:hit=1",
        '"><a href=javascript:hit=1>x',
        "' onmouseover='hit=1",
        "{{hit=1}}",
        "${hit=1}",
        "`",
        "&lt;b&gt;",
    ),
    *(
        "__proto__",
        "constructor",
        "hasOwnProperty",
        "\u202e",
        "\u2066",
        "\u0000",
        "\x1b[2J",
        "\x1b]8;;javascript:hit=1\x07x",
    ),
    *(
        "\ufeff",
        "a\u0301" * 40,
        "/../../",
        "%2e%2e%2f",
        "#/hive/tasks/x",
        "]]>",
        "<!--",
        "-->",
        "\r\n\r\n",
        "💥",
    ),
)


@pytest.mark.slow
async def test_no_text_becomes_markup_or_code_wherever_it_stands() -> None:
    """Names, labels, reasons, images, addresses, events and logs of random fragments, in every page and panel."""
    rng, cluster = random.Random(20), make(4, 16)
    plain = {kind: dict(rows) for kind, rows in cluster.rows.items()}
    keys = (
        "id",
        "service",
        "node",
        "state",
        "desired_state",
        "role",
        "availability",
        "mode",
        "protocol",
        "health",
        "manager",
    )

    def text() -> str:
        return "".join(rng.choices(FRAGMENTS, k=rng.randint(1, 6)))

    def spoiled(value: Any, name: str = "") -> Any:
        match value:
            case str() if name not in keys:
                return text()
            case dict() if name == "labels":
                return {text(): text() for _ in range(3)}
            case dict():
                return {key: spoiled(one, str(key)) for key, one in value.items()}
            case list() if name not in ("services", "networks", "secrets", "configs", "nodes"):
                return [spoiled(one, name) for one in value]
            case _:
                return value

    async with served(cluster) as url, a_browser() as browser, a_page(browser) as page:
        for _ in range(8):
            cluster.lines = [text() for _ in range(5)]
            for entry in cluster.history:
                entry |= {"Message": text(), "Name": text()}
            cluster.change(
                {kind: [spoiled(row) for row in rows.values()] for kind, rows in plain.items()}, {}
            )
            task = rng.choice(list(plain["tasks"]))
            for place in (
                *("hive", "services", "nodes", "tasks", "networks", "stacks", "volumes", "secrets", "events"),
                *(f"{kind}/{kind}/{rng.choice(list(plain[kind]))}" for kind in KINDS if kind != "stacks"),
                *(f"tasks/tasks/{task}/logs", f"hive/nodes/{rng.choice(list(plain['nodes']))}"),
            ):
                await page.goto(f"{url}#/{place}")
                await expect(page.locator("main")).not_to_be_empty()
                assert (
                    await page.locator("img, iframe, object, main script, aside script, main style").count()
                    == 0
                )
                content = await page.content()
                assert not re.search("[\u202e\u2066\ufeff]", content)
                assert not re.search(r"<[^>]+\son\w+=", re.sub(r'"[^"]*"', '""', content))
                assert await page.evaluate(
                    "[...document.querySelectorAll('[href]')].every(({ href }) => /^http/.test(href))"
                )
        assert await page.evaluate("typeof hit") == "undefined"


async def test_a_lost_stream_is_said_and_comes_back() -> None:
    cluster = make(3, 6)
    async with a_browser() as browser, a_page(browser, may_say="net::ERR") as page:
        async with served(cluster) as url:
            await page.goto(url)
            await expect(page.locator(".live")).to_have_text("live")
            port = int(url.split(":")[2].partition("/")[0])
        await expect(page.locator(".live")).not_to_have_text("live")
        cluster.rows["nodes"].popitem()
        cluster.revision += 1
        async with served(cluster, port):
            await expect(page.locator(".live")).to_have_text("live", timeout=20_000)
            await expect(page.get_by_role("application")).to_have_attribute(
                "aria-label", _starts("Map of 2 nodes")
            )


def _starts(text: str) -> re.Pattern[str]:
    return re.compile(f"^{re.escape(text)}")


def _contains(text: str) -> re.Pattern[str]:
    return re.compile(re.escape(text))


async def _drawn_colours(page: Page) -> int:
    """How many different colours the map has, of those that fill at least a hundred pixels."""
    return int(
        await page.evaluate(
            """() => {
                const canvas = document.querySelector(".comb canvas");
                const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
                const seen = new Map();
                for (let i = 0; i < data.length; i += 4) {
                    const colour = data[i] << 16 | data[i + 1] << 8 | data[i + 2];
                    seen.set(colour, (seen.get(colour) ?? 0) + 1);
                }
                return [...seen.values()].filter((number) => number > 100).length;
            }"""
        )
    )
