"""A real Prometheus with the packaged configuration and rules, in a network namespace."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.harness.documents import ROOT
from tests.support.machines.playground_rig import UNPACKED

RULES = ROOT / "packaging/prometheus/skep-alerts.yml"
_READ = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=10).read().decode(), end='')"


class Prometheus:
    """Runs Prometheus.  ``inside``: the command that enters its namespace (``nsenter ...``)."""

    def __init__(self, inside: Sequence[str]) -> None:
        self._inside = inside

    def fetched(self, url: str) -> str:
        """Return the content at ``url`` as seen from there.  Empty without a response."""
        command = [*self._inside, sys.executable, "-c", _READ, url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        return done.stdout if done.returncode == 0 else ""

    def asked(self, path: str) -> Any:
        """Return a response of Prometheus' own API, or None if it does not respond yet."""
        text = self.fetched(f"http://127.0.0.1:9090/api/v1/{path}")
        return json.loads(text)["data"] if text else None

    def targets(self) -> int:
        """Return the number of targets it has found."""
        return len((self.asked("targets") or {}).get("activeTargets", ()))

    def fired(self) -> set[str]:
        """Return the names of the firing alerts."""
        alerts = (self.asked("alerts") or {"alerts": []})["alerts"]
        return {one["labels"]["alertname"] for one in alerts if one["state"] == "firing"}

    @contextmanager
    def running(self, folder: Path) -> Iterator[None]:
        """Run Prometheus with the packaged files, but shorter times, because a test cannot wait minutes for an
        alert.
        """
        rules = [line for line in RULES.read_text().splitlines() if not line.strip().startswith("for:")]
        (folder / "skep-alerts.yml").write_text("\n".join(rules))
        packaged = (ROOT / "packaging/prometheus/prometheus.yml").read_text()
        (folder / "prometheus.yml").write_text(packaged.replace("15s", "1s"))
        command = [
            *self._inside,
            *(str(UNPACKED / "prometheus"), f"--config.file={folder}/prometheus.yml"),
            *(f"--storage.tsdb.path={folder}/data", "--web.listen-address=127.0.0.1:9090"),
        ]
        with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
            try:
                yield
            finally:
                process.terminate()
