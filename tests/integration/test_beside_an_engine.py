"""A node whose machine also runs a Docker Engine: plain containers are the engine's, the cluster's are Skep's."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from skep.playground.images.archive import Entry, File, image_archive
from tests.support.clients.terminal import Terminal, terminal
from tests.support.images.registry_rig import registry_image
from tests.support.machines.plain_engine import plain_engine
from tests.support.machines.playground_rig import (
    CLIS,
    IDLE,
    IMAGE,
    TestNode,
    a_playground,
    create,
    wait_running,
    wait_until,
)
from tests.support.machines.plugins import let_find

pytestmark = [pytest.mark.slow, pytest.mark.needs("dockerd"), pytest.mark.timeout(120)]

MIB = 1 << 20


@pytest.fixture(scope="module")
def engine_socket() -> Iterator[Path]:
    with plain_engine() as socket:
        yield socket


@pytest.fixture(scope="module")
def node(engine_socket: Path) -> Iterator[TestNode]:
    """A manager with that engine."""
    with a_playground("beside") as cluster:
        (cluster.directory / "m1" / "skep.toml").write_text(f'engine-socket = "{engine_socket}"\n')
        cluster.skep("kill", "m1")
        cluster.skep("start", "m1")
        m1 = cluster.node("m1")
        wait_until(lambda: m1.docker("node", "ls", check=False).returncode == 0, "the manager answers")
        yield m1


def on_terminal(node: TestNode, *words: str) -> AbstractContextManager[Terminal]:
    return terminal([CLIS[-1], *words], {"DOCKER_HOST": node.socket})


def engine_says(socket: Path, *words: str) -> str:
    """What the engine itself answers, asked past Skep."""
    done = subprocess.run(
        [CLIS[0], "-H", f"unix://{socket}", *words], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize("cli", CLIS)
def test_run_takes_its_standard_input_and_gives_its_exit_code(node: TestNode, cli: str) -> None:
    done = node.docker(
        "run", "--rm", "-i", IMAGE, "sh", "-c", "cat; exit 7", cli=cli, stdin="to the end", check=False
    )
    assert (done.returncode, done.stdout) == (7, "to the end")


def test_an_image_that_only_skep_has_is_copied_to_the_engine(node: TestNode, engine_socket: Path) -> None:
    mine = "lent:1"
    node.docker("tag", IMAGE, mine)
    assert mine not in engine_says(engine_socket, "images", "--format", "{{.Repository}}:{{.Tag}}")
    assert node.docker("run", "--rm", mine, "echo", "hello").stdout == "hello\n"
    assert mine in engine_says(engine_socket, "images", "--format", "{{.Repository}}:{{.Tag}}")
    ids = {
        node.docker("inspect", "--type", "image", "--format", "{{.Id}}", mine).stdout.strip(),
        engine_says(engine_socket, "inspect", "--type", "image", "--format", "{{.Id}}", mine),
    }
    assert len(ids) == 1


def test_a_bad_container_gets_the_engines_words(node: TestNode) -> None:
    done = node.docker("create", "--name", "-bad-", IMAGE, check=False)
    assert "Invalid container name" in done.stderr


def test_a_shell_on_a_terminal(node: TestNode) -> None:
    with on_terminal(node, "run", "--rm", "-it", IMAGE, "sh") as screen:
        screen.wait_shown("#")
        screen.type("tty; stty size; exit 5\n")
        screen.wait_shown("/dev/")
        assert screen.wait_end() == 5


def test_exec_attach_and_detach_keys(node: TestNode) -> None:
    node.docker("run", "-dit", "--name", "shell", IMAGE, "sh")
    try:
        with on_terminal(
            node, "exec", "-it", "shell", "sh", "-c", "echo in-$((40+2)); read x; exit $x"
        ) as screen:
            screen.wait_shown("in-42")
            screen.type("3\n")
            assert screen.wait_end() == 3
        with on_terminal(node, "attach", "--detach-keys", "ctrl-x,x", "shell") as screen:
            screen.type("echo out-$((50+1))\n")
            screen.wait_shown("out-51")
            screen.type("\x18x")
            screen.wait_end()
        assert node.docker("inspect", "--format", "{{.State.Running}}", "shell").stdout == "true\n"
    finally:
        node.docker("rm", "-f", "shell")


def test_logs_are_followed_to_the_end(node: TestNode) -> None:
    node.docker(
        "run", "-d", "--name", "talker", IMAGE, "sh", "-c", "for i in 1 2 3; do echo $i; sleep 0.3; done"
    )
    try:
        assert node.docker("logs", "-f", "talker").stdout == "1\n2\n3\n"
        assert node.docker("wait", "talker").stdout == "0\n"
    finally:
        node.docker("rm", "-f", "talker")


def test_files_are_copied_both_ways(node: TestNode, tmp_path: Path) -> None:
    content = os.urandom(8 * MIB)
    (tmp_path / "there").write_bytes(content)
    node.docker("create", "--name", "box", IMAGE, "sh")
    try:
        node.docker("cp", str(tmp_path / "there"), "box:/file")
        node.docker("cp", "box:/file", str(tmp_path / "back"))
        assert (tmp_path / "back").read_bytes() == content
    finally:
        node.docker("rm", "box")


def test_an_image_is_built(node: TestNode, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(f"FROM {IMAGE}\nCOPY word /word\nCMD cat /word\n")
    (tmp_path / "word").write_text("built\n")
    node.docker("run", "--rm", IMAGE, "true")  # so that the engine has the base
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": "/nonexistent",
        "DOCKER_HOST": node.socket,
        "DOCKER_BUILDKIT": "0",
    }
    done = subprocess.run(
        [CLIS[0], "build", "-t", "made:1", str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert node.docker("run", "--rm", "made:1").stdout == "built\n"


@pytest.fixture
def registry(node: TestNode) -> Iterator[str]:
    """The address of a registry on the node, where the engine does not reach it."""
    node.client().images.load(registry_image())
    node.docker("service", "create", "--detach", "--name", "registry", "--network", "host", "registry:1")
    try:
        wait_running(node, "registry", 1)
        yield "localhost:5000"
    finally:
        node.docker("service", "rm", "registry")


def pull_another(node: TestNode, name: str, word: str) -> None:
    """Pull an image with ``word`` that the node does not have, after it was pushed to its registry."""
    entries: dict[str, Entry] = {"word": File(word.encode())}
    archive = image_archive(entries, tags=[name], created="2026-01-01T00:00:00Z", config={})
    node.client().images.load(archive.data)
    wait_until(lambda: node.docker("push", name, check=False).returncode == 0, "the registry has it")
    node.docker("rmi", name)
    assert name not in node.docker("images", "--format", "{{.Repository}}:{{.Tag}}").stdout.split()
    node.docker("pull", name)


@pytest.mark.needs("docker-registry")
@pytest.mark.parametrize("buildkit", ["0", "1"])
def test_a_build_finds_images_that_were_loaded_tagged_or_pulled_through_the_nodes_socket(
    node: TestNode, engine_socket: Path, registry: str, tmp_path: Path, buildkit: str
) -> None:
    loaded, tagged = f"localhost:1/loaded{buildkit}:1", f"localhost:1/tagged{buildkit}:1"
    pulled = f"{registry}/pulled{buildkit}:1"
    pull_another(node, pulled, buildkit)
    archive = str(tmp_path / "image.tar")
    node.docker("tag", IMAGE, loaded)
    node.docker("save", "-o", archive, loaded)
    node.docker("rmi", loaded)
    node.docker("load", "-i", archive)
    node.docker("tag", loaded, tagged)
    there = engine_says(engine_socket, "images", "--format", "{{.Repository}}:{{.Tag}}").split()
    assert not {loaded, tagged, pulled} & set(there), "nothing is copied before it is needed"
    (tmp_path / "Dockerfile").write_text(
        f"FROM {loaded}\nLABEL a=b\nFROM {tagged}\nCOPY --from={loaded} /bin/busybox /copied\n"
        f"COPY --from={pulled} /word /word\n"
    )
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "DOCKER_HOST": node.socket,
        "DOCKER_BUILDKIT": buildkit,
    }
    let_find(tmp_path, "docker-buildx")
    done = subprocess.run(
        [CLIS[-1], "build", "-t", f"of-given{buildkit}:1", str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ids = set(node.docker("images", "-aq", "--no-trunc").stdout.split())
    assert node.docker("info", "--format", "{{.Images}}").stdout.strip() == str(len(ids)), "each counts once"


def made_here(node: TestNode, directory: Path, name: str, word: str) -> None:
    """Have the engine build an image that prints ``word``."""
    (directory / "Dockerfile").write_text(f"FROM {IMAGE}\nCOPY word /word\nCMD cat /word; sleep 1000\n")
    (directory / "word").write_text(f"{word}\n")
    environment = {
        "PATH": os.environ["PATH"], "HOME": "/nonexistent", "DOCKER_HOST": node.socket, "DOCKER_BUILDKIT": "0",
    }  # fmt: skip
    done = subprocess.run(
        [CLIS[0], "build", "-t", name, str(directory)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def service_prints(node: TestNode, name: str, image: str, word: str) -> None:
    """A service of ``image`` prints ``word``."""
    node.docker("service", "create", "--detach", "--name", name, image)
    try:
        wait_until(
            lambda: word in node.docker("service", "logs", "--raw", name, check=False).stdout,
            f"the service prints {word}",
            within_s=60,
        )
    finally:
        node.docker("service", "rm", name)


def test_an_image_that_the_engine_has_just_built_is_run_by_a_service(node: TestNode, tmp_path: Path) -> None:
    node.docker("run", "--rm", IMAGE, "true")  # so that the engine has the base
    for word in ("first", "second"):
        made_here(node, tmp_path, "localhost:1/built:1", word)
        service_prints(node, f"built-{word}", "localhost:1/built:1", word)


def test_an_image_that_the_engine_has_loaded_is_run_by_a_service(
    node: TestNode, engine_socket: Path, tmp_path: Path
) -> None:
    node.docker("run", "--rm", IMAGE, "true")
    made_here(node, tmp_path, "localhost:1/kept:1", "kept")
    archive = str(tmp_path / "kept.tar")
    engine_says(engine_socket, "save", "-o", archive, "localhost:1/kept:1")
    node.docker("rmi", "localhost:1/kept:1")
    assert "localhost:1/kept" not in node.docker("images", "--format", "{{.Repository}}").stdout
    engine_says(engine_socket, "load", "-i", archive)
    service_prints(node, "loaded", "localhost:1/kept:1", "kept")


def test_images_of_both_sides_are_one_list_with_one_removal(
    node: TestNode, engine_socket: Path, tmp_path: Path
) -> None:
    node.docker("tag", IMAGE, "ours:1")
    node.docker("run", "--rm", IMAGE, "true")
    made_here(node, tmp_path, "theirs:1", "theirs")
    listed = ("images", "--format", "{{.Repository}}:{{.Tag}}")
    lines = node.docker(*listed).stdout.split()
    assert {"ours:1", "theirs:1", IMAGE} <= set(lines)
    assert len([one for one in lines if not one.startswith("<none>")]) == len(set(lines) - {"<none>:<none>"})
    node.docker("run", "--rm", "ours:1", "true")
    assert "ours:1" in engine_says(engine_socket, *listed).split()
    node.docker("rmi", "ours:1", "theirs:1")
    assert not {"ours:1", "theirs:1"} & set(node.docker(*listed).stdout.split())
    assert not {"ours:1", "theirs:1"} & set(engine_says(engine_socket, *listed).split())


def test_a_services_volume_is_listed_inspected_and_removed(node: TestNode) -> None:
    node.docker("volume", "create", "plain")
    create(node, "keeper", 1, "--mount", "type=volume,source=kept,target=/data")
    try:
        wait_running(node, "keeper", 1)
        assert {"kept", "plain"} <= set(node.docker("volume", "ls", "-q").stdout.split())
        assert node.docker("volume", "inspect", "kept", "--format", "{{.Name}}").stdout == "kept\n"
        assert "in use" in node.docker("volume", "rm", "kept", check=False).stderr
    finally:
        node.docker("service", "rm", "keeper")
    wait_until(
        lambda: node.docker("volume", "rm", "kept", check=False).returncode == 0, "the volume is not used"
    )
    node.docker("volume", "rm", "plain")
    assert not {"kept", "plain"} & set(node.docker("volume", "ls", "-q").stdout.split())


def test_volumes_are_the_engines(node: TestNode, engine_socket: Path) -> None:
    node.docker("volume", "create", "data")
    assert "data" in engine_says(engine_socket, "volume", "ls", "-q").split()
    node.docker("run", "--rm", "-v", "data:/data", IMAGE, "sh", "-c", "echo kept >/data/file")
    assert node.docker("run", "--rm", "-v", "data:/data", IMAGE, "cat", "/data/file").stdout == "kept\n"
    node.docker("volume", "rm", "data")


def test_networks_of_the_engine_and_of_the_cluster_are_one_list(node: TestNode, engine_socket: Path) -> None:
    names = ("network", "ls", "--format", "{{.Name}} {{.Scope}}")
    node.docker("network", "create", "-d", "overlay", "--attachable", "ours")
    try:
        node.docker("network", "create", "--label", "a=b", "theirs")
        listed = node.docker(*names).stdout.split("\n")
        expected = ("bridge local", "docker_gwbridge local", "host local", "ingress swarm", "none local")
        assert sorted(filter(None, listed)) == sorted((*expected, "ours swarm", "theirs local"))
        assert node.docker(*names, "--filter", "label=a=b").stdout == "theirs local\n"
        assert "theirs" in engine_says(engine_socket, *names)
        assert "ours" not in engine_says(engine_socket, *names)
        for name in ("ours", "theirs"):
            for words in ((), ("-d", "overlay"), ("--config-only",)):
                taken = node.docker("network", "create", *words, name, check=False)
                assert f"network with name {name} already exists" in taken.stderr
        shown = node.docker("network", "inspect", "ours", "theirs", "--format", "{{.Driver}} {{.Scope}}")
        assert shown.stdout == "overlay swarm\nbridge local\n"
        assert node.docker("network", "prune", "-f").stdout.split() == [
            "Deleted",
            "Networks:",
            "ours",
            "theirs",
        ]
        assert node.docker(*names).stdout.split("\n")[:-1] == sorted(expected)
    finally:
        node.docker("network", "rm", "ours", "theirs", check=False)


def test_plain_containers_meet_by_name_and_alias_on_a_bridge_network(node: TestNode) -> None:
    node.docker("network", "create", "--subnet", "172.30.9.0/24", "meeting")
    try:
        node.docker(
            *("run", "-d", "--name", "one", "--network", "meeting", "--network-alias", "first"), IMAGE, *IDLE
        )
        node.docker("run", "-d", "--name", "two", IMAGE, *IDLE)
        node.docker("network", "connect", "--alias", "second", "meeting", "two")
        for name in ("one", "first", "second"):
            found = node.docker("exec", "two", "ping", "-c", "1", "-W", "5", name).stdout
            assert "172.30.9." in found, found
        refused = node.docker("network", "rm", "meeting", check=False)
        assert "has active endpoints" in refused.stderr
        node.docker("network", "disconnect", "meeting", "two")
        node.docker("network", "disconnect", "bridge", "two")
        node.docker("network", "connect", "bridge", "two")
        assert node.docker("network", "inspect", "bridge", "--format", "{{.Scope}}").stdout == "local\n"
        assert node.docker("exec", "two", "ping", "-c", "1", "-W", "2", "one", check=False).returncode != 0
    finally:
        node.docker("rm", "-f", "one", "two", check=False)
        node.docker("network", "rm", "meeting")


def test_why_a_container_joins_no_network_of_the_cluster(node: TestNode) -> None:
    node.docker("network", "create", "-d", "overlay", "closed")
    node.docker("network", "create", "-d", "overlay", "--attachable", "open")
    node.docker("run", "-d", "--name", "plain", IMAGE, *IDLE)
    try:
        for words, message in (
            (("closed", "plain"), "network closed not manually attachable"),
            (("open", "plain"), "is not part of the cluster"),
            (("open", "nosuch"), "No such container: nosuch"),
            (("nosuch", "plain"), "network nosuch not found"),
        ):
            done = node.docker("network", "connect", *words, check=False)
            assert done.returncode == 1
            assert message in done.stderr
        done = node.docker("network", "disconnect", "open", "plain", check=False)
        assert "is not connected to network open" in done.stderr
    finally:
        node.docker("rm", "-f", "plain")
        node.docker("network", "rm", "closed", "open")


def test_events_of_both_are_one_stream(node: TestNode) -> None:
    since = node.docker("info", "--format", "{{.SystemTime}}").stdout.strip()
    node.docker("run", "--rm", "--name", "theirs", IMAGE, "true")
    create(node, "ours", 1)
    try:
        wait_running(node, "ours", 1)

        def seen() -> set[str]:
            until = node.docker("info", "--format", "{{.SystemTime}}").stdout.strip()
            lines = node.docker("events", "--since", since, "--until", until, "--format", "{{json .}}").stdout
            names = set()
            for line in lines.splitlines():
                event = json.loads(line)
                attributes = event["Actor"]["Attributes"]
                names.add(f"{event['Type']} {event['Action']} {attributes.get('name', '').partition('.')[0]}")
            return names

        wanted = {"container start theirs", "container start ours", "service create ours"}
        wait_until(lambda: wanted <= seen(), "all events are listed")
    finally:
        node.docker("service", "rm", "ours")


def test_the_containers_of_tasks_are_skeps_and_shown_beside_the_engines(
    node: TestNode, engine_socket: Path
) -> None:
    node.docker("run", "-d", "--name", "plain", IMAGE, *IDLE)
    create(node, "web", 2)
    try:
        wait_running(node, "web", 2)
        names = node.docker("ps", "--format", "{{.Names}}").stdout.split()
        assert "plain" in names
        assert sum(name.startswith("web.") for name in names) == 2
        assert engine_says(engine_socket, "ps", "--format", "{{.Names}}").split() == ["plain"]
        task = next(name for name in names if name.startswith("web."))
        for name in (task, "plain"):
            assert node.docker("exec", name, "echo", "inside").stdout == "inside\n"
            assert node.docker("inspect", "--format", "{{.State.Status}}", name).stdout == "running\n"
        info = node.client().info()
        assert info["ContainersRunning"] == 3
        assert info["Swarm"]["ControlAvailable"] is True
        components = {one["Name"] for one in node.client().version()["Components"]}
        assert any("Docker" in name or "Engine" in name for name in components), components
    finally:
        node.docker("service", "rm", "web")
        node.docker("rm", "-f", "plain")
    wait_until(lambda: not node.docker("ps", "-q").stdout, "all containers are gone")


def test_on_a_network_that_only_the_cluster_has_skep_runs_the_container_itself(
    node: TestNode, engine_socket: Path
) -> None:
    node.docker("network", "create", "-d", "overlay", "--attachable", "lab")
    create(node, "db", 1, "--network", "lab", command=IDLE)
    wait_running(node, "db", 1)
    node.docker("run", "-d", "--name", "probe", "--network", "lab", IMAGE, *IDLE)
    assert "probe" not in engine_says(engine_socket, "ps", "-a", "--format", "{{.Names}}")
    ping = ("exec", "probe", "ping", "-c", "1", "-W", "2", "tasks.db")
    wait_until(lambda: node.docker(*ping, check=False).returncode == 0, "the task is found by name")
    node.docker("rm", "-f", "probe")
    node.docker("service", "rm", "db")
    wait_until(
        lambda: node.docker("network", "rm", "lab", check=False).returncode == 0, "the network is unused"
    )
