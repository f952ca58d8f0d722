"""TLS for the clients of a node: of its API, and of the dashboard."""

import ssl
from pathlib import Path

from skep.errors import FailedPrecondition


def server_context(certificate: Path, key: Path, authority: Path | None = None) -> ssl.SSLContext:
    """The node's own certificate; those of clients are verified by ``authority``.

    Raises: FailedPrecondition: a file is not what it should be.
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
            f"TLS cannot be served with {files}: {error}; they must be PEM files, the key that of the certificate"
        ) from error
    return context
