"""What every object of the cluster carries."""

from collections.abc import Mapping

from skep.model.encoding import ApiObject, Uint64


class Version(ApiObject, order=True):
    """Where an object stands in its own history (``Version.Index`` of the API).

    Lives inside the value and only grows: ``max(previous + 1, revision the writer had seen)``.  Written by
    the store when the wish of an object changes; it is no revision of etcd.
    """

    index: Uint64 = 0


class Driver(ApiObject):
    """A named plugin with its options: log driver, volume driver, network driver."""

    name: str = ""
    options: Mapping[str, str] = {}


class TLSInfo(ApiObject):
    """The trust a node or a cluster stands on (base64 in JSON for the two binary fields)."""

    trust_root: str = ""
    cert_issuer_subject: bytes = b""
    cert_issuer_public_key: bytes = b""
