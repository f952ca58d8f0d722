"""The command on an operator's machine: an environment with only the packages of the extra ``client``."""

import re
import subprocess
import venv
from importlib.metadata import distribution
from pathlib import Path

import pytest

from tests.support.harness.documents import ROOT
from tests.support.machines.daemon_rig import INIT, DaemonRig

DISTRIBUTION = "skep-orchestrator"
COMPOSE = "services:\n  web:\n    image: shop/web:${TAG:-7}\n"


def required_by(name: str, extra: str = "") -> set[str]:
    """Return the distributions that ``name`` needs on this machine, with theirs."""
    found: set[str] = set()
    for requirement in distribution(name).requires or ():
        other, marker = requirement.partition(";")[::2]
        is_wanted = f'extra == "{extra}"' in marker.replace("'", '"') or "extra" not in marker
        if is_wanted and _is_installed(_name(other)):
            # Markers without an extra name a platform or an older Python.
            found |= {_name(other)} | required_by(_name(other))
    return found


def _name(requirement: str) -> str:
    return re.split(r"[<>=!~ \[(]", requirement.strip())[0]


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except ModuleNotFoundError:
        return False
    return True


@pytest.fixture(scope="module")
def skep(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command of an environment that has links to those packages and to no others."""
    place = tmp_path_factory.mktemp("client")
    venv.create(place, with_pip=False)
    (site,) = place.glob("lib/python3*/site-packages")
    for name in required_by(DISTRIBUTION, "client"):
        for file in distribution(name).files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution(name).locate_file(top))))
    (site / "skep").symlink_to(ROOT / "skep")
    assert not any((site / package).exists() for package in ("structlog", "pyroute2", "google", "hpack"))
    return [str(place / "bin/python"), "-I", "-m", "skep.cli.main"]


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_client_shows_its_help_and_a_clusters_status(skep: list[str], rig: DaemonRig) -> None:
    rig.start()
    assert rig.ask("POST", "/v1.41/swarm/init", INIT)[0] == 200
    assert "Run containers on a cluster" in run([*skep, "--help"])
    host = f"unix://{rig.run / 'skep.sock'}"
    assert "healthy" in run([*skep, "-H", host, "status"])
    assert "leader" in run([*skep, "-H", host, "node", "ls"]).lower()


def test_a_client_reads_compose_files(skep: list[str], tmp_path: Path) -> None:
    (tmp_path / "compose.yaml").write_text(COMPOSE)
    assert "shop/web:7" in run([*skep, "stack", "config", "-c", str(tmp_path / "compose.yaml")])


def test_every_other_command_is_importable(skep: list[str]) -> None:
    """``skep COMMAND --help`` imports the command's module."""
    code = (
        "import importlib; from skep.cli.main import COMMANDS, NODE_COMMANDS\n"
        "for name in COMMANDS.keys() - {*NODE_COMMANDS}:\n"
        "    importlib.import_module(COMMANDS[name].location.partition(':')[0])\n"
        "import skep.top.app"
    )
    run([*skep[:2], "-c", code])


@pytest.mark.parametrize("name", ["daemon", "playground"])
def test_a_command_of_a_node_names_the_extra_that_it_needs(skep: list[str], name: str) -> None:
    done = subprocess.run([*skep, name, "--help"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        f"Error: skep {name} needs the Python packages of a node, which this installation does not have. "
        "Run pip install 'skep-orchestrator[server]'.\n"
    )
