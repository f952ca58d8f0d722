"""Fields that objects of the cluster have in common."""

from collections.abc import Mapping

from skep.model.values.encoding import ApiObject, Uint64


class Version(ApiObject, order=True):
    """The version of an object (``Version.Index`` of the API).

    It is stored inside the object and only grows.  When the head of an object changes, the store sets it to
    ``max(previous + 1, revision that the writer had seen)``.  It is not an etcd revision.
    """

    index: Uint64 = 0


class Driver(ApiObject):
    """A named plugin with its options: log driver, volume driver, network driver."""

    name: str = ""
    options: Mapping[str, str] = {}


class TLSInfo(ApiObject):
    """The trusted root and the issuer of certificates (base64 in JSON for the two binary fields)."""

    trust_root: str = ""
    cert_issuer_subject: bytes = b""
    cert_issuer_public_key: bytes = b""
