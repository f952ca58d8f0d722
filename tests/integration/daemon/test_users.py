"""Users of the API over TCP, with the real docker command: what their roles allow, and the end of their access."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.harness.documents import shell_blocks
from tests.support.machines.daemon_rig import INIT, SKEP, DaemonRig, wait_until
from tests.support.machines.playground_rig import CLIS
from tests.support.security.api_authority import an_authority

PORT = 2376
DASHBOARD_PORT = 8443
STACK = "com.docker.stack.namespace"


class Cluster:
    """A manager with an API by TLS, and the commands of its users."""

    def __init__(self, rig: DaemonRig, folder: Path, ca: Path, certificate: Path, key: Path) -> None:
        self.rig = rig
        self.home = folder / "home"
        self.home.mkdir()
        self.ca = ca
        rig.start(
            *("--host", f"unix://{rig.run}/skep.sock", "--host", f"tcp://127.0.0.1:{PORT}"),
            *("--tls-cert", str(certificate), "--tls-key", str(key), "--tls-ca", str(self.ca)),
            *("--dashboard", f"127.0.0.1:{DASHBOARD_PORT}"),
        )
        assert rig.ask("POST", "/v1.41/swarm/init", INIT)[0] == 200

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        assert self.rig.process is not None
        return subprocess.run(
            ["nsenter", "-t", str(self.rig.process.pid), "-n", *words],
            env={"PATH": os.environ["PATH"], "HOME": str(self.home), **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )

    def admin(self, *words: str) -> str:
        done = self.run(SKEP, "-H", f"unix://{self.rig.run}/skep.sock", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def add(self, name: str, role: str, *options: str) -> str:
        address = ("--address", f"tcp://localhost:{PORT}", "--ca", str(self.ca))
        printed = self.admin("user", "add", name, "--role", role, "--context", *address, *options)
        self.done(name, "version")  # the node knows the user when the command ends
        return printed

    def docker(self, user: str, *words: str) -> subprocess.CompletedProcess[str]:
        return self.run(CLIS[-1], "--context", user, *words)

    def refused(self, user: str, *words: str) -> str:
        done = self.docker(user, *words)
        assert done.returncode != 0, done.stdout
        return done.stderr

    def done(self, user: str, *words: str) -> str:
        done = self.docker(user, *words)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def curl(self, path: str, *options: str, port: int = PORT) -> tuple[int, str]:
        done = self.run(
            *("curl", "-sS", "-m", "10", "-w", "\n%{http_code}", "--cacert", str(self.ca), *options),
            f"https://localhost:{port}{path}",
        )
        body, _, status = done.stdout.rpartition("\n")
        return int(status or 0), body


@pytest.fixture
def cluster(rig: DaemonRig, tmp_path: Path) -> Cluster:
    authority = an_authority(tmp_path / "ours")
    return Cluster(rig, tmp_path, authority.root, *authority.pair("server"))


def test_users_do_by_docker_what_their_roles_allow(cluster: Cluster) -> None:
    cluster.add("vera", "viewer")
    cluster.add("shopper", "operator:shop")
    create = ("service", "create", "--detach", "--no-resolve-image", "--name")
    assert "ID" in cluster.done("vera", "service", "ls")
    cluster.done("vera", "node", "ls")
    assert "only administrators" in cluster.refused("vera", "run", "none")
    refusal = cluster.refused("vera", *create, "web", "none")
    assert (
        "vera may not POST /services/create: the role operator is needed, and the user has viewer" in refusal
    )
    # Of its own stack, and of no other.
    own = ("--label", f"{STACK}=shop")
    cluster.done("shopper", *create, "shop_web", *own, "none", "sleep", "600")
    assert "needs the label" in cluster.refused("shopper", *create, "shop_x", "none")
    other = cluster.refused("shopper", *create, "shop_x", "--label", f"{STACK}=blog", "none")
    assert "belongs to the stack blog" in other
    assert "begin with shop_" in cluster.refused("shopper", *create, "blog_web", *own, "none")
    bind = cluster.refused("shopper", *create, "shop_x", *own, "--mount", "type=bind,src=/,dst=/m", "none")
    assert "a bind mount of /: only administrators" in bind
    # Only its own is listed; another's is neither shown nor changed.
    cluster.admin(*create, "blog_web", "--label", f"{STACK}=blog", "none", "sleep", "600")
    assert cluster.done("shopper", "service", "ls", "--format", "{{.Name}}") == "shop_web"
    assert cluster.done("vera", "service", "ls", "-q").count("\n") == 1
    for command in ("inspect", "logs", "rm"):
        missing = cluster.refused("shopper", "service", command, "nosuch_web")
        assert cluster.refused("shopper", "service", command, "blog_web") == missing.replace("nosuch", "blog")
    cluster.done("shopper", "service", "scale", "--detach", "shop_web=2")
    # What gives rights is an administrator's.
    for words in (
        ("swarm", "join-token", "-q", "manager"),
        ("swarm", "unlock-key"),
        ("events", "--since", "1m"),
    ):
        cluster.refused("shopper", *words)
    refusal = cluster.refused("vera", "swarm", "join-token", "-q", "manager")
    assert "vera may not GET /swarm: only administrators may see join tokens" in refusal
    limit = cluster.run(SKEP, "--context", "vera", "cluster", "grace")
    assert limit.returncode == 0, limit.stderr


def test_the_removal_of_a_user_ends_its_access_at_once(cluster: Cluster) -> None:
    cluster.add("vera", "viewer")
    assert cluster.rig.process is not None
    following = subprocess.Popen(
        ["nsenter", "-t", str(cluster.rig.process.pid), "-n", CLIS[-1], "--context", "vera", "events"],
        env={"PATH": os.environ["PATH"], "HOME": str(cluster.home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    token = cluster.admin("user", "token", "vera")
    bearer = ("-H", f"Authorization: Bearer {token}")
    wait_until(lambda: cluster.curl("/services", *bearer)[0] == 200, "the token is known")
    assert json.loads(cluster.curl("/skep/access", *bearer)[1])["Name"] == "vera"
    assert cluster.curl("/services/create", *bearer, "-X", "POST", "-d", "{}")[0] == 403
    for wrong in ((), ("-H", f"Authorization: Bearer {token}x"), (*bearer, *bearer)):
        assert cluster.curl("/services", *wrong)[0] == 401
    assert following.poll() is None
    cluster.admin("user", "rm", "vera")
    following.communicate(timeout=10)  # the connection that it has is ended
    wait_until(lambda: cluster.curl("/services", *bearer)[0] == 401, "the token counts no more")
    assert "is unknown or was revoked" in cluster.refused("vera", "service", "ls")
    assert cluster.admin("user", "ls", "-o", "json") == "[]"


def test_a_browser_is_the_user_whose_token_logged_it_in(cluster: Cluster, tmp_path: Path) -> None:
    def ask(path: str, *options: str) -> tuple[int, str]:
        origin = ("-H", f"Origin: https://localhost:{DASHBOARD_PORT}", "-H", "Sec-Fetch-Site: same-origin")
        jar = ("-b", str(tmp_path / "jar"), "-c", str(tmp_path / "jar"))
        return cluster.curl(path, *origin, *jar, *options, port=DASHBOARD_PORT)

    token = cluster.admin("user", "add", "vera", "--role", "viewer", "--token")
    form = ("--data-urlencode", f"token={token}", "-D", str(tmp_path / "head"))
    wait_until(lambda: ask("/login", *form)[0] == 303, "the token logs in")
    location = (tmp_path / "head").read_text().partition("ocation: ")[2].split()[0]
    page = location.removesuffix("/ui/")
    assert "<!doctype html>" in ask(location)[1]
    view = json.loads(ask(f"{page}/skep/view")[1])
    assert [node["role"] for node in view["nodes"]] == ["manager"]
    body = ("-X", "POST", "-H", "Content-Type: application/json", "-d", '{"Availability": "drain"}')
    status, text = ask(f"{page}/nodes/{view['nodes'][0]['id']}/update?version=1", *body)
    assert (status, "vera may not POST /nodes/" in text) == (403, True), text
    assert ask(f"{page}/swarm")[0] == 403
    assert cluster.curl(f"{page}/skep/view", port=DASHBOARD_PORT)[0] == 401
    cluster.admin("user", "rm", "vera")
    wait_until(lambda: ask(f"{page}/skep/view")[0] == 401, "the session ends with its user")


@pytest.mark.slow
def test_the_guides_to_access_and_quotas(rig: DaemonRig, tmp_path: Path) -> None:
    certificates, users = shell_blocks("docs/guide/access.md")
    (quotas,) = shell_blocks("docs/guide/quotas.md")
    subprocess.run(
        ["sh", "-euc", certificates],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "NAME": "localhost"},
        capture_output=True,
        check=True,
    )
    files = (tmp_path / name for name in ("ca.pem", "server.pem", "server-key.pem"))
    cluster = Cluster(rig, tmp_path, *files)
    block = users + quotas
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    docker.symlink_to(CLIS[-1])
    where = {
        "PATH": f"{docker.parent}:{Path(SKEP).parent}:{os.environ['PATH']}",
        "SKEP_HOST": f"unix://{cluster.rig.run}/skep.sock",
        "ADDRESS": f"localhost:{PORT}",
        "CA": str(cluster.ca),
    }
    done = cluster.run("sh", "-euc", block, **where)
    assert done.returncode == 0, done.stderr
    assert "operator:shop" in done.stdout
    assert "reserved memory" in done.stdout


@pytest.mark.slow
def test_an_operator_deploys_its_stack_and_no_other(cluster: Cluster, tmp_path: Path) -> None:
    cluster.add("shopper", "operator:shop")
    file = tmp_path / "stack.yml"
    file.write_text('version: "3.8"\nservices: {web: {image: none, command: sleep 600}}\n')
    deploy = ("stack", "deploy", "--resolve-image", "never", "-c", str(file))
    cluster.done("shopper", *deploy, "shop")
    assert "shop_web" in cluster.done("shopper", "stack", "services", "shop")
    assert "the network belongs to the stack blog" in cluster.refused("shopper", *deploy, "blog")
    assert "Removing network shop_default" in cluster.done("shopper", "stack", "rm", "shop")
