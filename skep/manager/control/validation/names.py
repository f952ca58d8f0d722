"""Validation of objects' names.

Source: swarmkit, manager/controlapi/common.go (validateAnnotations, validateConfigOrSecretAnnotations).
"""

import re

from skep.errors import InvalidArgument

_DNS_NAME = re.compile(r"[a-zA-Z0-9](?:[-_]*[A-Za-z0-9]+)*")
_DNS_NAME_LENGTH_MAX = 63
"""Source: RFC 1035, section 2.3.4: a service's name is one label."""
_FILE_NAME = re.compile(r"[a-zA-Z0-9]+(?:[a-zA-Z0-9-_.]*[a-zA-Z0-9])?")
_FILE_NAME_LENGTH_MAX = 64
"""Source: swarmkit, manager/controlapi/common.go (isValidConfigOrSecretName)."""


def check_dns_name(name: str) -> None:
    """Refuse an invalid name of a service or network.  Raises: InvalidArgument."""
    if not name:
        raise InvalidArgument("meta: name must be provided")
    # Check the length first: the pattern's time grows with the square of it.
    if len(name) <= _DNS_NAME_LENGTH_MAX and not _DNS_NAME.fullmatch(name):
        raise InvalidArgument("name must be valid as a DNS name component")
    if len(name) > _DNS_NAME_LENGTH_MAX:
        if re.search(r"[^-_A-Za-z0-9]|^[-_]|[-_]$", name):
            raise InvalidArgument("name must be valid as a DNS name component")
        raise InvalidArgument("name must be 63 characters or fewer")


def check_file_name(name: str) -> None:
    """Refuse an invalid name of a secret or config.  Raises: InvalidArgument."""
    if not name:
        raise InvalidArgument("name must be provided")
    if len(name) > _FILE_NAME_LENGTH_MAX or not _FILE_NAME.fullmatch(name):
        raise InvalidArgument(
            "invalid name, only 64 [a-zA-Z0-9-_.] characters allowed, "
            "and the start and end character must be [a-zA-Z0-9]"
        )
