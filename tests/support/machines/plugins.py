"""The docker command's current plugins, as ``setup/plugins.sh`` installs them."""

import json
import sys
from pathlib import Path

import pytest

_PLACE = Path(sys.prefix) / "libexec" / "skep"


def plugin(name: str) -> Path:
    """Return the path of ``docker-buildx``, ``docker-compose`` or ``ansible_collections``.

    A machine without them skips the test, with the reason.
    """
    if not (_PLACE / name).exists():
        missing = _PLACE / "plugins-missing"
        assert missing.exists(), f"{name} is not in {_PLACE}: make setup places it"
        pytest.skip(missing.read_text().strip())
    return _PLACE / name


def let_find(home: Path, name: str) -> None:
    """Make the plugin ``name`` (``plugin``) available to a docker command with this home directory."""
    (home / ".docker").mkdir(exist_ok=True)
    config = {"cliPluginsExtraDirs": [str(plugin(name).parent)]}
    (home / ".docker" / "config.json").write_text(json.dumps(config))
