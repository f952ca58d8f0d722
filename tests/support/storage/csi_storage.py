"""A storage system behind CSI drivers, which refuses forbidden operations and can repeat the others.

It records forbidden operations as violations, which a test checks.
"""

import hashlib
import json
from typing import Any

SINGLE_NODE = (1, 2)
"""Access modes in which one node may have a volume."""


class Refused(Exception):
    """A refused call.  ``code``: the gRPC code."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Storage:
    """Volumes by id, with the nodes on which the controller has published them and nodes have mounted them."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        state = state or {}
        self.volumes: dict[str, dict[str, Any]] = state.get("volumes", {})
        self.violations: list[str] = state.get("violations", [])
        self.created: list[str] = state.get("created", [])
        """Names of volumes, once per creation."""
        self.is_asked_in_doubt = False
        """Set when the cluster cannot know where all volumes are, so that a refused call is not a violation."""

    def dumped(self) -> str:
        return json.dumps(
            {"volumes": self.volumes, "violations": self.violations, "created": self.created}, indent=1
        )

    def create(self, name: str, required: int, limit: int, mode: int, zones: list[str]) -> dict[str, Any]:
        id = "v-" + hashlib.sha256(name.encode()).hexdigest()[:12]
        asked = {"required": required, "limit": limit, "mode": mode}
        found = self.volumes.get(id)
        if found is None:
            size = required or limit or 1 << 20
            found = {
                "name": name,
                "asked": asked,
                "size": size,
                "zones": zones,
                "published": {},
                "mounted": {},
            }
            self.volumes[id] = found
            self.created.append(name)
        elif found["asked"] != asked:
            raise Refused("ALREADY_EXISTS", f"{name} exists with other parameters")
        return {"id": id, "size": found["size"], "zones": found["zones"]}

    def delete(self, id: str) -> None:
        found = self.volumes.get(id)
        if found is not None and (found["published"] or found["mounted"]):
            if not self.is_asked_in_doubt or found["mounted"]:
                self.violations.append(f"{id} deleted while it is on {sorted(found['published'])}")
            raise Refused("FAILED_PRECONDITION", "it is in use")
        self.volumes.pop(id, None)

    def publish(self, id: str, node: str, mode: int) -> dict[str, str]:
        found = self._found(id)
        others = sorted(set(found["published"]) - {node})
        if mode in SINGLE_NODE and others:
            if not self.is_asked_in_doubt:
                self.violations.append(f"{id} published on {node} while it is on {others}")
            raise Refused("FAILED_PRECONDITION", f"it is on {others}")
        found["published"][node] = mode
        return {"device": f"/dev/disk/{id}-{node}"}

    def unpublish(self, id: str, node: str) -> None:
        found = self.volumes.get(id)
        if found is not None:
            if node in found["mounted"]:
                self.violations.append(f"{id} unpublished from {node}, where it is mounted")
            found["published"].pop(node, None)

    def mount(self, id: str, node: str, context: dict[str, str]) -> None:
        found = self._found(id)
        if node not in found["published"]:
            self.violations.append(f"{id} mounted on {node}, where it is not published")
            raise Refused("FAILED_PRECONDITION", "it is not published here")
        if context.get("device") != f"/dev/disk/{id}-{node}":
            raise Refused("INVALID_ARGUMENT", f"a publish context of another node: {context}")
        others = sorted(set(found["mounted"]) - {node})
        if found["published"][node] in SINGLE_NODE and others:
            self.violations.append(f"{id} mounted on {node} while it is mounted on {others}")
        found["mounted"][node] = True

    def unmount(self, id: str, node: str) -> None:
        found = self.volumes.get(id)
        if found is not None:
            found["mounted"].pop(node, None)

    def published(self, name: str) -> list[str]:
        """Return the nodes on which the volume of that name is published."""
        return sorted(
            node for one in self.volumes.values() if one["name"] == name for node in one["published"]
        )

    def _found(self, id: str) -> dict[str, Any]:
        if id not in self.volumes:
            raise Refused("NOT_FOUND", f"no volume {id}")
        return self.volumes[id]
