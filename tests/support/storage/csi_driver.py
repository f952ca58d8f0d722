"""A CSI driver in its own process, with another implementation of gRPC (grpcio): one storage for all nodes.

Run ``python -m tests.support.storage.csi_driver SOCKET STORAGE NODE [ZONE]``.  ``STORAGE`` is a directory that all
drivers share.  It has ``state.json`` (``csi_storage``), a directory per volume, and ``faults.json``, which is read at
each call.  That file maps a method to its fault:

* ``{"fail": 0.5}``: probability that it fails, before or after its work.  ``"hang"``: seconds until it responds.
* ``{"refuse": "..."}``: it fails with this message.
* ``{"id": "..."}``: id that ``CreateVolume`` returns.  ``"size"`` and ``"zone"`` do the same.

Volumes are mounted by bind mounts, in the mount namespace in which the driver runs.  Block volumes are loop devices on
a file ``disk`` in the volume's directory.
"""

import contextlib
import fcntl
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from skep.csi import csi_pb2 as pb
from tests.support.storage.csi_storage import Refused, Storage

NAME = "disks.test.example"


class Driver:
    def __init__(self, storage: Path, node: str, zone: str) -> None:
        self.storage = storage
        self.node = node
        self.zone = zone

    @contextlib.contextmanager
    def state(self) -> Iterator[Storage]:
        path = self.storage / "state.json"
        with (self.storage / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            state = Storage(json.loads(path.read_text()) if path.exists() else None)
            try:
                yield state
            finally:
                beside = path.with_suffix(".new")
                beside.write_text(state.dumped())
                beside.replace(path)

    def fault(self, method: str) -> dict[str, Any]:
        with contextlib.suppress(FileNotFoundError, ValueError):
            faults = json.loads((self.storage / "faults.json").read_text())
            return dict(faults.get(method, faults.get("*", {})))
        return {}

    # --- Identity ---

    def get_plugin_info(self, request: Any, fault: Any) -> Any:
        return pb.GetPluginInfoResponse(name=NAME, vendor_version="1")

    def get_plugin_capabilities(self, request: Any, fault: Any) -> Any:
        services = [pb.PluginCapability(service=pb.PluginCapability.Service(type=type)) for type in (1, 2)]
        return pb.GetPluginCapabilitiesResponse(capabilities=services)

    def probe(self, request: Any, fault: Any) -> Any:
        return pb.ProbeResponse(ready=pb.Flag(value=True))

    # --- Controller ---

    def controller_get_capabilities(self, request: Any, fault: Any) -> Any:
        return pb.ControllerGetCapabilitiesResponse(capabilities=_rpcs(1, 2))

    def create_volume(self, request: Any, fault: Any) -> Any:
        zones = [one.segments["zone"] for one in request.accessibility_requirements.requisite]
        capacity, mode = request.capacity_range, request.volume_capabilities[0].access_mode.mode
        with self.state() as state:
            made = state.create(request.name, capacity.required_bytes, capacity.limit_bytes, mode, zones)
        (self.storage / made["id"]).mkdir(exist_ok=True)
        if _is_block(request.volume_capabilities[0]):
            with (self.storage / made["id"] / "disk").open("ab") as disk:
                disk.truncate(made["size"])
        volume = pb.Volume(
            volume_id=fault.get("id", made["id"]),
            capacity_bytes=fault.get("size", made["size"]),
            volume_context={"secrets": ",".join(f"{key}={value}" for key, value in request.secrets.items())},
        )
        for zone in [fault["zone"]] if "zone" in fault else made["zones"]:
            volume.accessible_topology.add().segments["zone"] = zone
        return pb.CreateVolumeResponse(volume=volume)

    def delete_volume(self, request: Any, fault: Any) -> Any:
        with self.state() as state:
            state.delete(request.volume_id)
        return pb.DeleteVolumeResponse()

    def controller_publish_volume(self, request: Any, fault: Any) -> Any:
        with self.state() as state:
            mode = request.volume_capability.access_mode.mode
            context = state.publish(request.volume_id, request.node_id, mode)
        return pb.ControllerPublishVolumeResponse(publish_context=context)

    def controller_unpublish_volume(self, request: Any, fault: Any) -> Any:
        with self.state() as state:
            state.unpublish(request.volume_id, request.node_id)
        return pb.ControllerUnpublishVolumeResponse()

    # --- Node ---

    def node_get_capabilities(self, request: Any, fault: Any) -> Any:
        return pb.NodeGetCapabilitiesResponse(capabilities=_rpcs(1))

    def node_get_info(self, request: Any, fault: Any) -> Any:
        return pb.NodeGetInfoResponse(
            node_id=self.node, accessible_topology=pb.Topology(segments={"zone": self.zone})
        )

    def node_stage_volume(self, request: Any, fault: Any) -> Any:
        with self.state() as state:
            state.mount(request.volume_id, self.node, dict(request.publish_context))
        if not _is_block(request.volume_capability):
            _bind(self.storage / request.volume_id, request.staging_target_path)
        elif not self._loop(request.volume_id).exists():
            disk = str(self.storage / request.volume_id / "disk")
            loop = subprocess.run(["losetup", "--find", "--show", disk], check=True, stdout=subprocess.PIPE)
            self._loop(request.volume_id).write_bytes(loop.stdout.strip())
        return pb.NodeStageVolumeResponse()

    def _loop(self, volume_id: str) -> Path:
        """Return the file with this node's device of a block volume."""
        return self.storage / f"{volume_id}.{self.node}.loop"

    def node_publish_volume(self, request: Any, fault: Any) -> Any:
        if _is_block(request.volume_capability):
            Path(request.target_path).touch()
            _bind(self._loop(request.volume_id).read_text(), request.target_path)
            return pb.NodePublishVolumeResponse()
        if not _is_mounted(request.staging_target_path):
            raise Refused("FAILED_PRECONDITION", "it is not staged")
        os.makedirs(request.target_path, exist_ok=True)
        _bind(request.staging_target_path, request.target_path)
        return pb.NodePublishVolumeResponse()

    def node_unpublish_volume(self, request: Any, fault: Any) -> Any:
        _unbind(request.target_path)
        target = Path(request.target_path)
        if target.is_dir():
            target.rmdir()
        else:
            target.unlink(missing_ok=True)
        return pb.NodeUnpublishVolumeResponse()

    def node_unstage_volume(self, request: Any, fault: Any) -> Any:
        _unbind(request.staging_target_path)
        if (loop := self._loop(request.volume_id)).exists():
            subprocess.run(["losetup", "--detach", loop.read_text()], check=True)
            loop.unlink()
        with self.state() as state:
            state.unmount(request.volume_id, self.node)
        return pb.NodeUnstageVolumeResponse()


def _is_block(capability: Any) -> bool:
    return str(capability.WhichOneof("access_type")) == "block"


def _is_mounted(path: str) -> bool:
    """Return whether a path is mounted.  ``os.path.ismount`` does not see a bind mount of the same file system."""
    return any(line.split()[4] == path for line in Path("/proc/self/mountinfo").read_text().splitlines())


def _rpcs(*types: int) -> list[Any]:
    return [pb.ServiceCapability(rpc=pb.ServiceCapability.RPC(type=type)) for type in types]


def _bind(source: str | Path, target: str) -> None:
    if not _is_mounted(target):
        subprocess.run(["mount", "--bind", str(source), target], check=True)


def _unbind(target: str) -> None:
    if _is_mounted(target):
        subprocess.run(["umount", target], check=True)


METHODS = {
    "Identity": ("GetPluginInfo", "GetPluginCapabilities", "Probe"),
    "Controller": (
        *("ControllerGetCapabilities", "CreateVolume", "DeleteVolume"),
        *("ControllerPublishVolume", "ControllerUnpublishVolume"),
    ),
    "Node": (
        *("NodeGetCapabilities", "NodeGetInfo", "NodeStageVolume", "NodePublishVolume"),
        *("NodeUnpublishVolume", "NodeUnstageVolume"),
    ),
}


def handler_of(driver: Driver, method: str) -> Any:
    """Return the handler of a method, with its faults."""
    name = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in method).lstrip("_")
    serve: Callable[[Any, Any], Any] = getattr(driver, name)

    def handle(request: Any, context: grpc.ServicerContext) -> Any:
        fault = driver.fault(method)
        time.sleep(fault.get("hang", 0))
        fails = random.random() < fault.get("fail", 0)
        if fails and random.random() < 0.5:
            context.abort(grpc.StatusCode.UNAVAILABLE, f"{method} fails")
        if "refuse" in fault:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, fault["refuse"])
        try:
            response = serve(request, fault)
        except Refused as refused:
            context.abort(grpc.StatusCode[refused.code], str(refused))
        if fails:
            context.abort(grpc.StatusCode.INTERNAL, f"{method} fails after its work")
        return response

    request_type = getattr(pb, f"{method}Request")
    return grpc.unary_unary_rpc_method_handler(
        handle,
        request_deserializer=request_type.FromString,
        response_serializer=lambda one: one.SerializeToString(),
    )


def main() -> None:
    socket, storage, node, *zone = sys.argv[1:]
    driver = Driver(Path(storage), node, zone[0] if zone else "z1")
    server = grpc.server(ThreadPoolExecutor(32))
    for service, methods in METHODS.items():
        handlers = {method: handler_of(driver, method) for method in methods}
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(f"csi.v1.{service}", handlers),)
        )
    Path(socket).unlink(missing_ok=True)
    Path(socket).parent.mkdir(parents=True, exist_ok=True)
    server.add_insecure_port(f"unix:{socket}")
    server.start()
    print("ready", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
