"""Takes the pictures of the dashboard for ``docs/guide``, from a real cluster in which several things go wrong.

::

    .venv/bin/python -m docs.pictures              # as root, a few minutes

A playground of three managers and three workers runs two stacks and some services of the distribution's busybox under
other names.  One service crashes, one waits for a node that nobody has, the update of one is paused by its failures,
one job runs, one has completed, one node is drained and one has lost its power.
"""

import argparse
import asyncio
import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from playwright.async_api import Browser, Page, expect

from tests.support.clients.browser import a_browser, a_page
from tests.support.clients.dashboard_rig import skep_ui
from tests.support.machines.playground_rig import IMAGE, SKEP, TestCluster, TestNode, a_playground, wait_until

GUIDE = Path(__file__).with_name("guide")
QUALITY = 82
LAPTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
SETTLED_S = 120

_IDLE = "trap 'exit 0' TERM INT; while :; do sleep 3600 & wait $!; done"
_BUSY = "while :; do :; done"
_CRASH = "echo loading index; echo 'cannot open /index/segments: No such file or directory' >&2; exit 3"
_MIGRATION = "echo migrating; echo 'column orders.total does not exist' >&2; exit 1"
_IMAGES = (
    *("shop/web:1.4.2", "shop/web:1.5.0", "shop/api:2.0.1", "shop/api:2.1.0", "shop/cart:2.19.0"),
    *("shop/orders:1.7.0", "shop/postgres:16", "shop/search:0.9.0", "shop/thumbnails:1.2.0"),
    *("blog/ghost:5.87", "blog/mysql:8.4", "ops/exporter:1.8", "ops/importer:3.1", "ops/reports:1.0"),
)


_SETTLED = {
    "shop_orders": "4/4",
    "shop_cart": "3/3",
    "shop_db": "1/1",
    "blog_ghost": "2/2",
    "blog_mysql": "1/1",
}


def _compose() -> str:
    """Return the stack file of the shop.  JSON is YAML."""
    idle = ["sh", "-c", _IDLE.replace("$", "$$")]

    def service(image: str, **more: object) -> dict[str, object]:
        return {"image": image, "command": idle, "networks": ["back"], **more}

    gradual = {"parallelism": 1, "delay": "20s", "order": "start-first"}
    services = {
        "web": service(
            "shop/web:1.4.2",
            ports=["8080:80"],
            networks=["front"],
            configs=[{"source": "nginx", "target": "/etc/nginx.conf"}],
            deploy={"replicas": 4, "update_config": gradual},
        ),
        "api": service("shop/api:2.0.1", networks=["front", "back"], deploy={"replicas": 6}),
        "cart": service("shop/cart:2.19.0", deploy={"replicas": 3}),
        "orders": service("shop/orders:1.7.0", deploy={"replicas": 4}, secrets=["db-password"]),
        "db": service("shop/postgres:16", volumes=["data:/var/lib/postgresql/data"], secrets=["db-password"]),
        "search": service("shop/search:0.9.0", deploy={"replicas": 2}) | {"command": ["sh", "-c", _CRASH]},
    }
    return json.dumps(
        {
            "services": services,
            "networks": {"front": {}, "back": {"driver_opts": {"encrypted": ""}}},
            "volumes": {"data": {}},
            "secrets": {"db-password": {"file": "./password.txt"}},
            "configs": {"nginx": {"file": "./nginx.conf"}},
        }
    )


def _load_images(swarm: TestCluster, m1: TestNode, folder: Path) -> None:
    for image in _IMAGES:
        m1.docker("tag", IMAGE, image)
    archive = str(folder / "images.tar")
    m1.docker("save", "--output", archive, *_IMAGES)
    swarm.skep("load", archive)


def _start(swarm: TestCluster, m1: TestNode, folder: Path) -> None:
    """Start everything, and let each part go wrong in its own way."""
    (folder / "compose.yaml").write_text(_compose())
    (folder / "password.txt").write_text("not a secret")
    (folder / "nginx.conf").write_text("worker_processes 2;")

    def create(name: str, image: str, command: str, *options: str) -> None:
        words = ("--detach", "--name", name, *options, image, "sh", "-c", command)
        m1.docker("service", "create", *words)

    deploy = ("stack", "deploy", "--detach", "-c", str(folder / "compose.yaml"), "shop")
    subprocess.run([SKEP, "--host", m1.socket, *deploy], check=True, timeout=120)
    of_blog = ("--label", "com.docker.stack.namespace=blog")
    create("blog_ghost", "blog/ghost:5.87", _IDLE, *of_blog, "--replicas", "2", "--publish", "8081:2368")
    create(
        "blog_mysql",
        "blog/mysql:8.4",
        _IDLE,
        *of_blog,
        *("--mount", "type=volume,source=blog_mysql,target=/var/lib/mysql"),
    )
    create("exporter", "ops/exporter:1.8", _IDLE, "--mode", "global")
    create(
        "thumbnails",
        "shop/thumbnails:1.2.0",
        _BUSY,
        "--limit-cpu",
        "0.4",
        "--constraint",
        "node.hostname==w2",
    )
    create(
        "import-catalog", "ops/importer:3.1", "echo imported", "--mode", "replicated-job", "--replicas", "4"
    )
    job = ("--mode", "replicated-job", "--replicas", "4", "--max-concurrent", "2")
    create("reindex", "ops/importer:3.1", "sleep 3600", *job)
    create("reports", "ops/reports:1.0", _IDLE, "--constraint", "node.labels.gpu==yes")
    m1.docker("node", "update", "--availability", "drain", "m3")
    _until(m1, "shop_api", "6/6")
    _until(m1, "shop_web", "4/4")
    migration = ("--image", "shop/api:2.1.0", "--args", f'sh -c "{_MIGRATION}"')
    m1.docker("service", "update", "--detach", "--update-failure-action", "pause", *migration, "shop_api")
    paused = ("service", "inspect", "shop_api", "--format", "{{.UpdateStatus.State}}")
    wait_until(lambda: "paused" in m1.docker(*paused).stdout, "the update is paused", SETTLED_S)
    swarm.skep("kill", "w3")
    down = ("node", "inspect", "w3", "--format", "{{.Status.State}}")
    wait_until(lambda: "down" in m1.docker(*down).stdout, "w3 is down", SETTLED_S)
    for service, replicas in _SETTLED.items():
        _until(m1, service, replicas)
    m1.docker("service", "update", "--detach", "--image", "shop/web:1.5.0", "shop_web")


def _until(m1: TestNode, service: str, replicas: str) -> None:
    shown = ("service", "ls", "--filter", f"name={service}", "--format", "{{.Replicas}}")
    wait_until(lambda: m1.docker(*shown).stdout.strip() == replicas, f"{service} has {replicas}", SETTLED_S)


async def _shoot(browser: Browser, address: str, size: dict[str, int], name: str, show: Callable) -> None:
    options = {"viewport": size, "device_scale_factor": 1.5, "color_scheme": "light"}
    # The explanation of a task that is replaced meanwhile is answered with 404.
    async with a_page(browser, may_say="404", **options) as page:
        await page.goto(address)
        await expect(page.locator(".live")).to_have_text("live", timeout=30_000)
        await show(page)
        await page.screenshot(path=GUIDE / f"dashboard-{name}.webp", type="webp", quality=QUALITY)


async def _hive(page: Page) -> None:
    await expect(page.locator(".attention")).to_contain_text("w3 is down")
    await expect(page.locator(".progress h2 i")).to_have_text("2 services", timeout=60_000)
    await expect(page.locator(".bars rect").first).to_be_attached()


async def _service(page: Page) -> None:
    found = "skep.cluster.all('services').find(({ name }) => name === 'shop_api').id"
    id = await page.evaluate(found)
    await page.goto(f"{page.url.partition('#')[0]}#/services/services/{id}")
    await expect(page.locator("aside pre").first).to_be_visible(timeout=30_000)


async def _take(swarm: TestCluster, folder: Path) -> None:
    m1 = swarm.node("m1")
    await asyncio.to_thread(_load_images, swarm, m1, folder)
    await asyncio.to_thread(_start, swarm, m1, folder)
    shots = ((LAPTOP, "hive", _hive), (LAPTOP, "service", _service), (PHONE, "phone", _hive))
    async with a_browser() as browser:
        for size, name, show in shots:
            async with skep_ui(m1.socket) as address:
                await _shoot(browser, address, size, name, show)


def main() -> None:
    """Run the playground and take the pictures."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder, a_playground("pictures", managers=3, workers=3) as swarm:
        asyncio.run(_take(swarm, Path(folder)))


if __name__ == "__main__":
    main()
