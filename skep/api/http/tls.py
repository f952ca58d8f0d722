"""TLS contexts for the servers of a node's API and dashboard."""

import ssl
from pathlib import Path

from skep.errors import FailedPrecondition


def server_context(certificate: Path, key: Path, authority: Path | None = None) -> ssl.SSLContext:
    """Return a context with the node's certificate that verifies client certificates by ``authority``, if given.

    Raises: FailedPrecondition: a file is missing or invalid.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
        if authority is not None:
            context.load_verify_locations(authority)
    except (OSError, ssl.SSLError) as error:
        files = ", ".join(str(one) for one in (certificate, key, authority) if one is not None)
        raise FailedPrecondition(
            f"TLS cannot be served with {files}: {error}; they must be PEM files, and the key must be the certificate's"
        ) from error
    return context
