"""The container part of a task spec, as written by the user."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

import msgspec

from skep.model.values.encoding import ApiObject, FileMode, GoInt, always
from skep.model.values.ids import ConfigId, SecretId
from skep.model.values.meta import Driver
from skep.model.values.times import SECOND_NS, Nanoseconds

DEFAULT_STOP_GRACE_NS = 10 * SECOND_NS
"""Default grace period, as in Docker."""
HEALTH_INTERVAL_NS_MIN = SECOND_NS
"""Shortest interval of a health check that users below administrator and images may choose. A probe takes some 50 ms
of a processor, outside the container's cgroup."""
_SHORTEST_NS = 1_000_000
"""Shortest time that a health check accepts. 0 means the default."""


class CredentialSpec(ApiObject):
    """Windows credentials of a container (gMSA).  One of the three fields is set and names their source."""

    config: str = always("")
    file: str = always("")
    registry: str = always("")


class SELinuxContext(ApiObject):
    """SELinux labels of a container's processes.  ``disable`` runs it without SELinux confinement."""

    disable: bool = always(False)
    user: str = always("")
    role: str = always("")
    type: str = always("")
    level: str = always("")


class SeccompOpts(ApiObject):
    """``mode`` is default, unconfined, or custom with ``profile``, a JSON file."""

    mode: str = ""
    profile: bytes = b""


class AppArmorOpts(ApiObject):
    """``mode`` is default or disabled."""

    mode: str = ""


class Privileges(ApiObject):
    """Security options of the container (seccomp and AppArmor since API 1.46)."""

    credential_spec: CredentialSpec | None = always(None)
    selinux_context: SELinuxContext | None = msgspec.field(
        name="SELinuxContext", default_factory=lambda: None
    )
    seccomp: SeccompOpts | None = None
    app_armor: AppArmorOpts | None = None
    no_new_privileges: bool = always(False)


class HealthConfig(ApiObject):
    """The health check.  ``test`` is ``["CMD", ...]``, ``["CMD-SHELL", x]`` or ``["NONE"]``."""

    __go_name__: ClassVar[str | None] = "container.HealthConfig"

    test: tuple[str, ...] = ()
    interval: Nanoseconds = 0
    timeout: Nanoseconds = 0
    start_period: Nanoseconds = 0
    start_interval: Nanoseconds = 0
    retries: GoInt = 0

    def refusal(self, name: str) -> str:
        """Return why the value of the field ``name`` is refused, in Docker's words, or an empty text."""
        for what, duration in (
            ("Interval", self.interval),
            ("Timeout", self.timeout),
            ("StartPeriod", self.start_period),
            ("StartInterval", self.start_interval),
        ):
            if duration and duration < _SHORTEST_NS:
                return f"{what} in {name} cannot be less than 1ms"
        return f"Retries in {name} cannot be negative" if self.retries < 0 else ""


class DNSConfig(ApiObject):
    """The container's resolver: addresses, search domains, and options of ``resolv.conf``."""

    nameservers: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


class FileTarget(ApiObject):
    """The file of a secret or config in the container.  ``mode`` is a Go file mode (octal 0444 = 292)."""

    name: str = always("")
    uid: str = always("")
    gid: str = always("")
    mode: FileMode = always(0)


SecretFileTarget = Annotated[FileTarget, msgspec.Meta(extra={"go": "swarm.SecretReferenceFileTarget"})]
ConfigFileTarget = Annotated[FileTarget, msgspec.Meta(extra={"go": "swarm.ConfigReferenceFileTarget"})]


class RuntimeTarget(ApiObject):
    """Marks a config as a credential spec, which the runtime reads.  It is not mounted into the container."""

    __go_name__: ClassVar[str | None] = "swarm.ConfigReferenceRuntimeTarget"


class SecretReference(ApiObject):
    """A secret of a service, by id.  Without ``file.name``, the file is called ``secret_name``."""

    file: SecretFileTarget | None = always(None)
    secret_id: SecretId = always(SecretId(""))
    secret_name: str = always("")


class ConfigReference(ApiObject):
    """A config of a service, by id.  Exactly one of ``file`` and ``runtime`` is set."""

    file: ConfigFileTarget | None = None
    runtime: RuntimeTarget | None = None
    config_id: ConfigId = always(ConfigId(""))
    config_name: str = always("")


class Ulimit(ApiObject):
    """A resource limit (``setrlimit``) without the prefix ``RLIMIT_``: ``nofile``.  -1 is unlimited."""

    __go_name__: ClassVar[str | None] = "units.Ulimit"

    name: str = always("")
    hard: int = always(0)
    soft: int = always(0)


MountType = Annotated[str, msgspec.Meta(extra={"go": "mount.Type"})]
Propagation = Annotated[str, msgspec.Meta(extra={"go": "mount.Propagation"})]


class BindOptions(ApiObject):
    """``propagation`` is private, rprivate, shared, rshared, slave or rslave.  Empty means rprivate."""

    __go_name__: ClassVar[str | None] = "mount.BindOptions"

    propagation: Propagation = ""
    non_recursive: bool = False
    create_mountpoint: bool = False
    read_only_non_recursive: bool = False
    read_only_force_recursive: bool = False


class VolumeOptions(ApiObject):
    """``no_copy`` leaves a new volume empty, instead of copying the image's content at the target."""

    __go_name__: ClassVar[str | None] = "mount.VolumeOptions"

    no_copy: bool = False
    labels: Mapping[str, str] = {}
    subpath: str = ""
    driver_config: Driver | None = None


class TmpfsOptions(ApiObject):
    """``size_bytes`` 0 means the kernel's default, half of the memory.  An option is ``[key]`` or ``[key, value]``."""

    __go_name__: ClassVar[str | None] = "mount.TmpfsOptions"

    size_bytes: int = 0
    mode: FileMode = 0
    options: tuple[tuple[str, ...], ...] = ()


class ImageMountOptions(ApiObject):
    """``subpath`` is a directory of the image, relative to its root.  Empty means the whole image."""

    __go_name__: ClassVar[str | None] = "mount.ImageOptions"

    subpath: str = ""


class ClusterOptions(ApiObject):
    """Options of a mounted cluster (CSI) volume.  Docker defines none yet."""

    __go_name__: ClassVar[str | None] = "mount.ClusterOptions"


class Mount(ApiObject):
    """A mount in the container.  ``type`` is bind, volume, tmpfs, npipe, cluster or image."""

    __go_name__: ClassVar[str | None] = "mount.Mount"

    type: MountType = ""
    source: str = ""
    target: str = ""
    read_only: bool = False
    consistency: str = ""
    bind_options: BindOptions | None = None
    volume_options: VolumeOptions | None = None
    image_options: ImageMountOptions | None = None
    tmpfs_options: TmpfsOptions | None = None
    cluster_options: ClusterOptions | None = None


class ContainerSpec(ApiObject):
    """The container that a task runs.  A field that is None gets the engine's default, which may differ from an empty
    value.
    """

    image: str = ""
    labels: Mapping[str, str] = {}
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    hostname: str = ""
    env: tuple[str, ...] = ()
    dir: str = ""
    user: str = ""
    groups: tuple[str, ...] = ()
    privileges: Privileges | None = None
    init: bool | None = None
    stop_signal: str = ""
    tty: bool = False
    open_stdin: bool = False
    read_only: bool = False
    mounts: tuple[Mount, ...] = ()
    stop_grace_period: Nanoseconds | None = None
    healthcheck: HealthConfig | None = None
    hosts: tuple[str, ...] = ()
    dns_config: DNSConfig | None = None
    secrets: tuple[SecretReference, ...] = ()
    configs: tuple[ConfigReference, ...] = ()
    isolation: Annotated[str, msgspec.Meta(extra={"go": "container.Isolation"})] = ""
    sysctls: Mapping[str, str] = {}
    capability_add: tuple[str, ...] = ()
    capability_drop: tuple[str, ...] = ()
    ulimits: tuple[Ulimit, ...] = ()
    oom_score_adj: int = 0

    @property
    def stop_grace_ns(self) -> int:
        """Nanoseconds between the stop signal and SIGKILL."""
        return DEFAULT_STOP_GRACE_NS if self.stop_grace_period is None else self.stop_grace_period
