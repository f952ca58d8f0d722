"""What a container is given in place of the API's socket."""

import asyncio
import errno
import gc
import itertools
import os
import socket
from pathlib import Path

import pytest

from skep.engine.api_sockets import NONE, ApiSockets, Given
from skep.engine.containers.container import Container, ContainerConfig, MountPoint
from skep.engine.runtime import processes
from skep.errors import FailedPrecondition, InvalidArgument
from skep.model.container import Mount
from skep.model.permissions.rights import ApiAccess
from skep.model.values.ids import ContainerId
from tests.support.file_faults import Faults, file_faults, walk


@pytest.fixture
def apis(tmp_path: Path) -> ApiSockets:
    (tmp_path / "run").mkdir()
    (tmp_path / "host.sock").touch()
    (tmp_path / "link.sock").symlink_to("host.sock")
    return ApiSockets([tmp_path / "host.sock", tmp_path / "run/skep.sock"], tmp_path / "run", NONE.server)


def bind(source: Path | str, destination: str = "/in", **options: str) -> MountPoint:
    return MountPoint(type="bind", source=str(source), destination=destination, **options)  # type: ignore[arg-type]


OWN = Path("/own")


@pytest.mark.parametrize("name", ["host.sock", "link.sock", "run/skep.sock", "run/../host.sock"])
def test_every_name_of_the_socket_is_the_containers_own(apis: ApiSockets, tmp_path: Path, name: str) -> None:
    given = apis.give([bind(tmp_path / name)], OWN)
    assert given == Given((bind("/own/skep.sock"),), True)
    assert apis.others([Mount(type="bind", source=str(tmp_path / name), target="/in")]) == []


@pytest.mark.parametrize("name", ["/var/run/docker.sock", "/run/docker.sock"])
def test_docker_s_socket_means_this_api_even_where_none_listens(apis: ApiSockets, name: str) -> None:
    assert apis.give([bind(name)], OWN).mounts[0].source == "/own/skep.sock"


@pytest.mark.parametrize(
    ("source", "labels", "is_plain", "access"),
    [
        ("/var/run/docker.sock", {}, True, ApiAccess.FULL),
        ("run/skep.sock", {}, True, ApiAccess.FULL),
        ("/var/run/docker.sock", {"skep.api": "read"}, True, ApiAccess.READ),
        ("/var/run/docker.sock", {"skep.api": "inspect"}, True, ApiAccess.INSPECT),
        ("/var/run/docker.sock", {}, False, ApiAccess.READ),
        ("/var/run/docker.sock", {"skep.api": "full"}, False, ApiAccess.FULL),
        ("/", {}, True, ApiAccess.READ),
        ("run", {}, True, ApiAccess.READ),
        ("/srv", {}, True, ApiAccess.READ),
    ],
)
def test_only_who_names_the_socket_of_a_plain_container_gives_it_all(
    apis: ApiSockets,
    tmp_path: Path,
    source: str,
    labels: dict[str, str],
    *,
    is_plain: bool,
    access: ApiAccess,
) -> None:
    assert apis.access(labels, [bind(tmp_path / source)], is_plain=is_plain) is access


def test_an_unknown_access_is_refused(apis: ApiSockets) -> None:
    with pytest.raises(InvalidArgument, match="expected read, inspect or full"):
        apis.access({"skep.api": "all"}, [bind("/run/docker.sock")], is_plain=True)


def test_a_directory_with_the_nodes_sockets_has_the_containers_own_alone(
    apis: ApiSockets, tmp_path: Path
) -> None:
    outer = bind(tmp_path, "/host")
    cover = MountPoint(type="bind", source="/own", destination="/host/run", read_only=True, internal=True)
    assert apis.give([outer], OWN) == Given((outer, cover), True)
    exact = bind(tmp_path / "run", "/x")
    assert apis.give([exact], OWN).mounts[1].destination == "/x"
    root = apis.give([bind("/", "/host", propagation="rslave")], OWN)
    assert root.mounts[1].destination == f"/host{tmp_path}/run"


def test_a_cover_is_not_passed_on_to_the_machine(apis: ApiSockets, tmp_path: Path) -> None:
    with pytest.raises(
        FailedPrecondition, match="cannot be mounted with propagation rshared, but with rslave"
    ):
        apis.give([bind(tmp_path, propagation="rshared")], OWN)


def test_the_nodes_own_files_are_not_for_containers(apis: ApiSockets, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="belongs to this node"):
        apis.give([bind(tmp_path / "run/manager.sock")], OWN)


def test_a_driver_of_cluster_volumes_in_a_container_has_the_directory_of_their_sockets(
    apis: ApiSockets, tmp_path: Path
) -> None:
    points = (bind(tmp_path / "run/csi"), bind(tmp_path / "run/csi/disks"))
    assert apis.give(points, OWN) == Given(points, False)
    with pytest.raises(InvalidArgument, match="belongs to this node"):
        apis.give([bind(tmp_path / "run/csi/../manager.sock")], OWN)


def test_other_mounts_stay_as_they_are(apis: ApiSockets, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    points = (
        bind(tmp_path / "data"),
        MountPoint(type="volume", source=str(tmp_path / "run/x"), destination="/v"),
        MountPoint(type="bind", source=str(tmp_path / "run/secret"), destination="/s", internal=True),
    )
    assert apis.give(points, OWN) == Given(points, False)


def test_docker_s_directory_of_volumes_is_the_nodes(tmp_path: Path) -> None:
    of_docker = tmp_path / "docker/volumes"
    apis = ApiSockets([], tmp_path / "run", NONE.server, tmp_path / "volumes", of_docker)
    mount = Mount(type="bind", source=f"{of_docker}/", target="/v")
    assert apis.give([bind(mount.source)], OWN) == Given((bind(tmp_path / "volumes"),), False)
    assert apis.others([mount]) == []
    of_docker.mkdir(parents=True)
    assert apis.give([bind(mount.source)], OWN) == Given((bind(mount.source),), False), "an engine's"
    assert apis.others([mount]) == [mount]


# --- faults -------------------------------------------------------------------------------------------------------


class Servers:
    """What is served, in the place of the node's."""

    def __init__(self) -> None:
        self.served: dict[str, socket.socket] = {}

    def serve(self, container: Container, listener: socket.socket) -> None:
        self.served[container.id] = listener

    def forget(self, id: ContainerId) -> None:
        if (listener := self.served.pop(id, None)) is not None:
            listener.close()


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.needs("root")
async def test_whichever_call_fails_a_socket_of_a_container_is_served_or_not_there(tmp_path: Path) -> None:
    container = Container(
        id=ContainerId("c1"), name="c1", image="", image_id="", config=ContainerConfig(path="sh")
    )

    async def life(place: Path, faults: Faults) -> None:
        servers = Servers()
        apis = ApiSockets([], place / "run", servers)
        try:
            apis.open(container, place / "own")
        except OSError:
            assert not servers.served
            assert apis.take(container.id) is None
        faults.end()
        apis.open(container, place / "own")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(place / "own/skep.sock"))
        apis.close(container.id)

    before = descriptors()
    assert await walk(tmp_path, life) > 3
    assert descriptors() == before


@pytest.mark.needs("root")
async def test_a_socket_that_cannot_be_taken_over_now_is_not_taken_for_lost(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "skep.sock"))
        listener.listen()
        conmon = await asyncio.create_subprocess_exec("sleep", "600", pass_fds=[listener.fileno()])
    container = Container(
        id=ContainerId("c1"),
        name="c1",
        image="",
        image_id="",
        config=ContainerConfig(path="sh", mounts=(bind("/run/docker.sock"),)),
        monitor=processes.find(conmon.pid),
    )
    try:
        for n in itertools.count():
            servers = Servers()
            apis = ApiSockets([], tmp_path / "run", servers)
            with file_faults(Path("/proc")) as faults:
                faults.plan(n, errno.EMFILE)
                try:
                    apis.adopt(container, tmp_path)
                except OSError as error:
                    assert error.errno == errno.EMFILE  # noqa: PT017
                    continue
            assert servers.served.keys() == {"c1"}
            apis.close(container.id)
            if not faults.hits:
                break
        assert n >= 2
    finally:
        conmon.kill()
        await conmon.wait()
    apis.adopt(container, tmp_path)
    assert not servers.served, "it has ended"
