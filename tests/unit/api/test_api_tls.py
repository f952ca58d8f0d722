"""TLS for the clients of a node: files that do not fit are named."""

from pathlib import Path

import pytest

from skep.api.http.tls import server_context
from skep.errors import FailedPrecondition
from tests.support.security.api_authority import an_authority


def test_files_that_cannot_be_served_with_are_named(tmp_path: Path) -> None:
    authority = an_authority(tmp_path / "ca")
    certificate, key = authority.pair("server")
    _, other_key = authority.pair("other")
    server_context(certificate, key, authority.root)
    with pytest.raises(FailedPrecondition, match=f"{certificate}, {other_key}: .*they must be PEM files"):
        server_context(certificate, other_key)
    with pytest.raises(FailedPrecondition, match=f"{key}, {tmp_path}/none: .*they must be PEM files"):
        server_context(certificate, key, tmp_path / "none")
