"""Secrets as environment variables, which a service has to request explicitly and which causes a warning.

A file is safer, because every child process inherits the environment and programs print it.  But many images accept
passwords only this way.
"""

import re
from collections.abc import Iterable, Mapping

from skep.errors import InvalidArgument
from skep.model.container import ContainerSpec, SecretReference

SECRET_ENV_LABEL = "skep.secret-env"
"""Container label ``VARIABLE=TARGET,...``: the secrets with these targets are also set as environment variables."""
PLUGIN = ("Secret", "skep-env")
"""Plugin that nodes with support for it report.  Tasks of such a service run only on these nodes."""
VARIABLES_MAX = 64
"""Largest number of a service's variables that come from secrets."""
VALUE_BYTES_MAX = 64 << 10
"""Largest value in bytes.  The kernel allows 128 KiB for a variable including its name."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")


def secret_variables(container: ContainerSpec | None) -> Mapping[str, SecretReference]:
    """Return the secrets to set as environment variables in a service's containers, by variable.

    Raises: InvalidArgument: the label is invalid, or names a secret that the service does not have.
    """
    text = container.labels.get(SECRET_ENV_LABEL, "") if container is not None else ""
    if container is None or not text:
        return {}
    by_target = {one.file.name or one.secret_name: one for one in container.secrets if one.file is not None}
    given = {entry.partition("=")[0] for entry in container.env}
    found: dict[str, SecretReference] = {}
    for word in text.split(","):
        name, equals, target = (part.strip() for part in word.partition("="))
        if not equals or not _NAME.fullmatch(name) or name in found:
            raise _invalid(text, "expected VARIABLE=TARGET, separated by commas, each variable once")
        if name in given:
            raise _invalid(text, f"{name} is already set by --env")
        if target not in by_target:
            raise _invalid(text, f"the service has no secret with the target {target}")
        found[name] = by_target[target]
    if len(found) > VARIABLES_MAX:
        raise _invalid(text, f"at most {VARIABLES_MAX} variables")
    return found


def check_secret_env(container: ContainerSpec | None, service_labels: Iterable[str]) -> None:
    """Check the label for secrets in the environment.

    Raises: InvalidArgument: the label is invalid, or is set on the service instead of the container.
    """
    if SECRET_ENV_LABEL in service_labels:
        raise InvalidArgument(
            f"the label {SECRET_ENV_LABEL} works on containers only: set it with --container-label, not with --label"
        )
    secret_variables(container)


def _invalid(text: str, reason: str) -> InvalidArgument:
    return InvalidArgument(f"invalid label {SECRET_ENV_LABEL}={text[:200]}: {reason}")


def secret_env_warning(container: ContainerSpec | None) -> str:
    """Return a warning for the user who creates or updates the service, or an empty text without such variables."""
    names = ", ".join(sorted(secret_variables(container)))
    if not names:
        return ""
    return (
        f"secrets are in the environment ({names}): every process that the container starts inherits them, and crash "
        "reports and debug pages show them; prefer the files in /run/secrets where the image takes files"
    )


def environment_entry(name: str, data: bytes) -> str:
    """Return ``NAME=value``.  Raises: InvalidArgument: a variable cannot have that value.  The error does not show the
    value.
    """
    try:
        value = data.decode()
    except UnicodeDecodeError:
        raise InvalidArgument(f"the secret of variable {name} is no text (UTF-8)") from None
    if "\0" in value:
        raise InvalidArgument(f"the secret of variable {name} has a zero byte")
    if len(data) > VALUE_BYTES_MAX:
        raise InvalidArgument(f"the secret of variable {name} is larger than {VALUE_BYTES_MAX} bytes")
    return f"{name}={value}"
