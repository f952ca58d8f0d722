"""What a container is given in place of the API's socket."""

from pathlib import Path

import pytest

from skep.engine.api_sockets import NONE, ApiSockets, Given
from skep.engine.container import MountPoint
from skep.errors import FailedPrecondition, InvalidArgument
from skep.model.container import Mount


@pytest.fixture
def apis(tmp_path: Path) -> ApiSockets:
    (tmp_path / "run").mkdir()
    (tmp_path / "host.sock").touch()
    (tmp_path / "link.sock").symlink_to("host.sock")
    return ApiSockets([tmp_path / "host.sock", tmp_path / "run/skep.sock"], tmp_path / "run", NONE._server)


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


def test_other_mounts_stay_as_they_are(apis: ApiSockets, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    points = (
        bind(tmp_path / "data"),
        MountPoint(type="volume", source=str(tmp_path / "run/x"), destination="/v"),
        MountPoint(type="bind", source=str(tmp_path / "run/secret"), destination="/s", internal=True),
    )
    assert apis.give(points, OWN) == Given(points, False)


def test_docker_s_directory_of_volumes_is_the_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apis = ApiSockets([], tmp_path / "run", NONE._server, tmp_path / "volumes")
    mount = Mount(type="bind", source="/var/lib/docker/volumes/", target="/v")
    monkeypatch.setattr("os.path.exists", lambda _: False)
    assert apis.give([bind(mount.source)], OWN) == Given((bind(tmp_path / "volumes"),), False)
    assert apis.others([mount]) == []
    monkeypatch.setattr("os.path.exists", lambda _: True)
    assert apis.give([bind(mount.source)], OWN) == Given((bind(mount.source),), False), "an engine's"
    assert apis.others([mount]) == [mount]
