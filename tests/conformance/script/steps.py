"""One request of the script, and short ways to write it."""

from typing import Any

import msgspec


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One request.  ``body``: JSON, or bytes as they are; ``keep``: remember the object in the answer by this name."""

    name: str
    method: str
    path: str
    body: Any = None
    headers: dict[str, str] = {}
    keep: str = ""


IMAGE = "busybox:1"


def service(
    name: str | None = None, /, *, image: str = IMAGE, container: Any = None, task: Any = None, **spec: Any
) -> Any:
    """A service spec as a client would send it: ``container`` and ``task`` add to the nested objects."""
    body: dict[str, Any] = {
        "TaskTemplate": {"ContainerSpec": {"Image": image, **(container or {})}, **(task or {})},
        **spec,
    }
    return body if name is None else {"Name": name, **body}


def create(name: str, body: Any, keep: str = "") -> Step:
    return Step(name=name, method="POST", path="/v1.41/services/create", body=body, keep=keep)


def get(name: str, path: str, keep: str = "") -> Step:
    return Step(name=name, method="GET", path=path, keep=keep)


def post(name: str, path: str, body: Any = None, keep: str = "") -> Step:
    return Step(name=name, method="POST", path=path, body=body, keep=keep)


def delete(name: str, path: str) -> Step:
    return Step(name=name, method="DELETE", path=path)


def port(**fields: Any) -> Any:
    return {"Mode": "vip", "Ports": [{"TargetPort": 80, **fields}]}


def init(**fields: Any) -> Any:
    return {"ListenAddr": "10.77.0.1:2377", "AdvertiseAddr": "10.77.0.1", **fields}


SECOND = 1_000_000_000
