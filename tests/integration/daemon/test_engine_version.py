"""The Docker Engine beside a node comes and goes; what the node announces follows."""

import json
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from skep.api.http.versions import NEWEST
from tests.support.machines.daemon_rig import DaemonRig, wait_until


@contextmanager
def engine(path: Path, response: bytes) -> Iterator[None]:
    """Something that gives ``answer`` to every request on the unix socket ``path``."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(response)))
            self.end_headers()
            self.wfile.write(response)

        def log_message(self, format: str, *args: object) -> None:
            pass

        def address_string(self) -> str:
            return "engine"

    path.unlink(missing_ok=True)
    with socketserver.ThreadingUnixStreamServer(str(path), Handler) as server:
        server.daemon_threads = True
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            yield
        finally:
            server.shutdown()
            serving.join()


def announced(rig: DaemonRig) -> str:
    version: str = rig.get("/version")[1]["ApiVersion"]
    return version


def test_an_engine_that_starts_later_is_found_and_lowers_the_api_version(
    rig: DaemonRig, tmp_path: Path
) -> None:
    path = tmp_path / "engine.sock"
    rig.start("--engine-socket", str(path))
    assert announced(rig) == str(NEWEST)
    old = json.dumps({"Version": "20.10.24", "ApiVersion": "1.41"}).encode()
    with engine(path, old):
        wait_until(lambda: announced(rig) == "1.41", "the engine is found")
        assert rig.get("/v1.42/info")[0] == 400
        components = rig.get("/v1.41/version")[1]["Components"]
        assert {"ApiVersion": "1.41"} in [one["Details"] for one in components]
    assert announced(rig) == "1.41"  # it is away for a moment; the next will hardly be another


def test_invalid_responses_of_an_engine_do_no_harm(rig: DaemonRig, tmp_path: Path) -> None:
    path = tmp_path / "engine.sock"
    for response in (b"", b"{", b"[]", b'{"Version": 1}', b"null"):
        with engine(path, response):
            rig.start("--engine-socket", str(path))
            assert announced(rig) == str(NEWEST)
            rig.stop()
