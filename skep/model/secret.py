"""Secrets and configs as in the API.  Their data are separate objects (``Payload``)."""

from collections.abc import Mapping

from skep.model.values.encoding import ApiObject, always
from skep.model.values.ids import ConfigId, SecretId
from skep.model.values.meta import Driver, Version
from skep.model.values.times import ZERO_TIME, Timestamp


class SecretSpec(ApiObject):
    """A secret without its data (see ``Payload``)."""

    name: str = ""
    labels: Mapping[str, str] = always({})
    driver: Driver | None = None
    templating: Driver | None = None


class Secret(ApiObject):
    """A secret.  Writer: API."""

    id: SecretId
    version: Version = always(Version())
    created_at: Timestamp = always(ZERO_TIME)
    updated_at: Timestamp = always(ZERO_TIME)
    spec: SecretSpec = always(SecretSpec())


class ConfigSpec(ApiObject):
    """A config with its data, less than 1000 KiB (``manager.control.files``)."""

    name: str = ""
    labels: Mapping[str, str] = always({})
    data: bytes = b""
    templating: Driver | None = None


class Config(ApiObject):
    """A config.  Writer: API."""

    id: ConfigId
    version: Version = always(Version())
    created_at: Timestamp = always(ZERO_TIME)
    updated_at: Timestamp = always(ZERO_TIME)
    spec: ConfigSpec = always(ConfigSpec())
    written_by: str = ""
    """The weakest role that has written it, such as ``operator:shop``, if it records a stack's revision.  Empty if
    unknown.
    """
