"""Certificates of host names as the API shows them, without keys."""

from enum import Enum

from skep.model.values.encoding import ApiObject, always
from skep.model.values.times import Timestamp

LETS_ENCRYPT = "https://acme-v02.api.letsencrypt.org/directory"
"""Directory of the authority that is used unless another one is given."""


class CertificateProgress(Enum):
    """State of a host name's certificate."""

    WANTED = "wanted"
    """Nothing was ordered yet."""
    ORDERING = "ordering"
    VALID = "valid"
    FAILING = "failing"
    """The last order failed.  An older certificate may still be valid."""


class AuthorityRequest(ApiObject):
    """Body of a request that sets the authority.

    Attributes:
        email: Address to which the authority may write.
        directory: URL of the authority's directory.
        roots: Trusted roots (PEM) for connections to the authority, or empty to use the roots of the system.
        agree_tos: Whether the user agrees to the authority's terms of service.
    """

    email: str = ""
    directory: str = LETS_ENCRYPT
    roots: str = ""
    agree_tos: bool = False


class AuthorityShown(ApiObject):
    """The authority.  ``error``: why it cannot be used, or empty."""

    email: str = always("")
    directory: str = always("")
    is_registered: bool = always(False)
    error: str = ""
    failing_since: Timestamp = Timestamp("")
    next_attempt_at: Timestamp = Timestamp("")


class CertificateShown(ApiObject):
    """The certificate of one host name."""

    name: str = always("")
    state: CertificateProgress = always(CertificateProgress.WANTED)
    is_wanted: bool = always(True)
    """Whether a service still has the name."""
    secret: str = ""
    """The secret with the certificate, or empty if it comes from the authority."""
    not_before: Timestamp = Timestamp("")
    not_after: Timestamp = Timestamp("")
    order: str = ""
    """Step of the order that is not over, for people.  Empty without an order."""
    next_attempt_at: Timestamp = Timestamp("")
    error: str = ""
    failing_since: Timestamp = Timestamp("")


class CertificatesShown(ApiObject):
    """All certificates, and the authority if one is configured."""

    authority: AuthorityShown | None = None
    certificates: tuple[CertificateShown, ...] = always(())
