"""Converts keys that need rights over the node into container labels (``skep.model.permissions.rights``)."""

from skep.model.options.labels import RELABEL
from skep.stack.compose.reading import MappingReader


def rights_labels(service: MappingReader, deploy: MappingReader) -> dict[str, str]:
    """Return container labels for the settings that Docker's services have no field for."""
    made: dict[str, str] = {}
    if service.boolean("privileged"):
        made["skep.privileged"] = "true"
    made |= _device_rights(service, deploy) | _relabeled(service)
    for key in ("pid", "ipc", "uts"):
        text = service.text(key)
        if text == "host":
            made[f"skep.{key}"] = text
        elif text and not (key == "ipc" and text in ("private", "shareable")):
            service.problem(key, f"{text!r} is not supported for cluster services: expected host")
    for key, label in (("shm_size", "skep.shm-size"), ("memswap_limit", "skep.memory-swap")):
        if (size := service.size(key)) is not None:
            made[label] = str(size)
    for key, label in (
        ("cpu_shares", "skep.cpu-shares"),
        ("cpuset", "skep.cpuset-cpus"),
        ("mem_swappiness", "skep.memory-swappiness"),
    ):
        if text := service.text(key):
            made[label] = text
    return made | _io_limits(service.reader("blkio_config"), service)


def _relabeled(service: MappingReader) -> dict[str, str]:
    """Return the label with the SELinux modes of mounts: ``bind.selinux``, or ``z`` and ``Z`` of a short mount."""
    modes = []
    volumes = service.node("volumes")
    for node in (volumes.items or ()) if volumes is not None else ():
        if node.entries is not None:
            bind, target = node.entries.get("bind"), node.entries.get("target")
            mode = (bind.entries or {}).get("selinux") if bind is not None else None
            modes += [f"{target.text}={mode.text}"] if target is not None and mode is not None else []
        elif len(parts := node.text.split(":")) == 3:
            modes += [f"{parts[1]}={word}" for word in parts[2].split(",") if word in ("z", "Z")]
    return {RELABEL: ",".join(modes)} if modes else {}


def _device_rights(service: MappingReader, deploy: MappingReader) -> dict[str, str]:
    made: dict[str, str] = {}
    devices: list[str] = []
    for node, path in service.each("devices"):
        if node.entries is None:
            devices.append(node.text)
            continue
        one = MappingReader(node, path, service.report)
        devices.append(
            ":".join(filter(None, (one.text("source"), one.text("target"), one.text("permissions"))))
        )
        one.close()
    if devices:
        made["skep.devices"] = ",".join(devices)
    if rules := service.texts("device_cgroup_rules"):
        made["skep.device-rules"] = ",".join(rules)
    found = service.node("gpus")
    if found is not None and found.items is None:
        made["skep.gpus"] = found.text
    requests = service.each("gpus") if found is not None and found.items is not None else []
    resources = deploy.reader("resources")
    reserved = resources.reader("reservations") if resources is not None else None
    requests += reserved.each("devices") if reserved is not None else []
    for node, path in requests:
        made["skep.gpus"] = _gpus(MappingReader(node, path, service.report))
    return made


def _gpus(request: MappingReader) -> str:
    capabilities, count, ids = (
        request.texts("capabilities"),
        request.text("count"),
        request.texts("device_ids"),
    )
    request.ignore("driver", "GPUs are found through their vendors' CDI files")
    request.refuse("options", "GPU driver options are not supported")
    if capabilities and "gpu" not in capabilities:
        request.problem(
            "capabilities", f"expected gpu: devices with {', '.join(capabilities)} cannot be reserved"
        )
    request.close()
    return f"device={','.join(ids)}" if ids else count or "all"


def _io_limits(limits: MappingReader | None, service: MappingReader) -> dict[str, str]:
    if limits is None:
        return {}
    made: dict[str, str] = {}
    if weight := limits.text("weight"):
        made["skep.blkio-weight"] = weight
    limits.refuse("weight_device", "weights per device are not supported: use weight")
    for key in ("device_read_bps", "device_write_bps", "device_read_iops", "device_write_iops"):
        parts = []
        for node, path in limits.each(key):
            one = MappingReader(node, path, service.report)
            parts.append(f"{one.text('path')}:{one.text('rate')}")
            one.close()
        if parts:
            made[f"skep.{key.replace('_', '-')}"] = ",".join(parts)
    limits.close()
    return made
