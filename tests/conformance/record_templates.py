"""Record what a real Docker Engine makes of templates: ``python -m tests.conformance.record_templates``.

As root, with dockerd; half a minute. Kept in ``recorded/templates.json``: for each text of ``templates.py`` what a
container's environment shows, or the error of ``POST /services/create``.
"""

import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.docker_lab import DockerLab
from bench.engine import EngineError
from skep.playground.images.busybox import busybox_archive
from tests.conformance.record import RECORDED
from tests.conformance.templates import LABELS, SERVICE, TEMPLATES


def main() -> None:
    archive = asyncio.run(busybox_archive())
    with tempfile.TemporaryDirectory(prefix="skep-templates-", dir="/var/tmp") as directory:
        lab = DockerLab(Path(directory) / "docker")
        lab.up(archive.data, archive.image_id)
        try:
            found = record(lab)
            version = lab.engine.get("/version")["Version"]
        finally:
            lab.down()
    recorded = {"engine": version, "templates": found}
    (RECORDED / "templates.json").write_text(json.dumps(recorded, indent=1, ensure_ascii=False) + "\n")


def record(lab: DockerLab) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for text in TEMPLATES:
        try:
            lab.engine.post("/services/create", spec(lab, "tried", [f"X={text}"], replicas=0))
        except EngineError as error:
            found[text] = {"error": json.loads(str(error).partition(": ")[2])["message"]}
        else:
            lab.engine.delete("/services/tried")
    kept = [text for text in TEMPLATES if text not in found]
    lab.engine.post(
        "/services/create", spec(lab, SERVICE, [f"X{number}={text}" for number, text in enumerate(kept)])
    )
    shown = dict(entry.split("=", 1) for entry in environment(lab))
    found.update({text: {"output": shown[f"X{number}"]} for number, text in enumerate(kept)})
    return {text: found[text] for text in TEMPLATES}


def environment(lab: DockerLab) -> list[str]:
    """Of the service's container, as soon as there is one."""
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        if containers := lab.engine.get("/containers/json"):
            return list(lab.engine.get(f"/containers/{containers[0]['Id']}/json")["Config"]["Env"])
        time.sleep(0.1)
    raise TimeoutError(str(lab.engine.get("/tasks")))


def spec(lab: DockerLab, name: str, env: list[str], replicas: int = 1) -> dict[str, Any]:
    container = {"Image": lab.image, "Args": ["sleep", "600"], "Env": env}
    return {
        "Name": name,
        "Labels": LABELS,
        "TaskTemplate": {"ContainerSpec": container},
        "Mode": {"Replicated": {"Replicas": replicas}},
    }


if __name__ == "__main__":
    main()
