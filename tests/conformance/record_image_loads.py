"""Record what a real Docker Engine says to hostile image archives: ``python -m tests.conformance.record_image_loads``.

Needs root.  The engine uses overlay2, as engines do: other storage drivers word their errors differently.
"""

import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from tests.conformance.record import RECORDED, UnixConnection, run, wait_for
from tests.support.images.archives import GOOD, HOSTILE

NAMESPACE = "skep-image-loads"
HANGS = ("layer is a named pipe",)
"""What the engine never answers."""


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """``error`` and ``stream`` of the answer's lines, without the engine's own paths."""

    status: int
    error: str = ""
    stream: str = ""


def answer_of(status: int, body: bytes) -> Answer:
    """What an answer to ``POST /images/load`` says."""
    lines = [msgspec.json.decode(line) for line in body.splitlines() if line.strip()]
    return Answer(
        status=status,
        error="".join(line.get("error", "") for line in lines),
        stream="".join(line.get("stream", "") for line in lines),
    )


def ask(engine: Path, archive: bytes) -> Answer:
    connection = UnixConnection(engine)
    try:
        headers = {"Content-Type": "application/x-tar"}
        connection.request("POST", "/v1.41/images/load?quiet=1", body=archive, headers=headers)
        response = connection.getresponse()
        content = response.read()
    finally:
        connection.close()
    content = re.sub(rb"/[^ \"]*/docker-import-\d+/?", b"", content)
    return answer_of(response.status, content)


def identify(engine: Path, name: str) -> str:
    """The id of an image that was loaded."""
    connection = UnixConnection(engine)
    try:
        connection.request("GET", f"/v1.41/images/{name}/json")
        return str(msgspec.json.decode(connection.getresponse().read())["Id"])
    finally:
        connection.close()


@contextmanager
def running_engine(folder: Path) -> Iterator[Path]:
    run("ip", "netns", "add", NAMESPACE)
    try:
        engine = subprocess.Popen(
            [
                *(
                    "nsenter",
                    f"--net=/run/netns/{NAMESPACE}",
                    "unshare",
                    "--mount",
                    "--propagation",
                    "private",
                ),
                *("dockerd", "--data-root", str(folder / "data"), "--exec-root", str(folder / "exec")),
                *("--pidfile", str(folder / "pid"), "--host", f"unix://{folder / 'docker.sock'}"),
                *("--iptables=false", "--bridge=none", "--storage-driver=overlay2"),
            ],
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_for(folder / "docker.sock", engine)
            yield folder / "docker.sock"
        finally:
            engine.send_signal(signal.SIGTERM)
            engine.wait(30)
    finally:
        run("ip", "netns", "delete", NAMESPACE)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="skep-record-") as folder, running_engine(Path(folder)) as engine:
        responses = {name: ask(engine, make()) for name, make in HOSTILE.items() if name not in HANGS}
        ids = {}
        for name, make in GOOD.items():
            ask(engine, make())
            ids[name] = identify(engine, name)
    for file, content in (("image_loads.json", responses), ("image_ids.json", ids)):
        text = msgspec.json.format(msgspec.json.encode(content), indent=1)
        (RECORDED / file).write_bytes(text + b"\n")


if __name__ == "__main__":
    main()
