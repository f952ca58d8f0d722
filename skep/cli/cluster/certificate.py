"""``skep certificate`` and ``skep door acme``: certificates of the host names of services."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack
from urllib.parse import quote

import click

from skep.cli.endpoint import HostOptions
from skep.cli.output import OutputOptions, Screen, Shown, shows, table
from skep.cli.running import run_requests
from skep.model.options.certificates import LETS_ENCRYPT
from skep.model.task_end import printable

Command = TypeVar("Command", bound=Callable[..., Any])

_AUTHORITY_S = 90.0
"""Time limit in seconds for reading the authority's terms, which the manager itself limits to 75."""


class AuthorityOptions(TypedDict):
    """The values of ``authority_options``."""

    directory: str
    roots: Path | None
    agree_tos: bool


def authority_options(command: Command) -> Command:
    """Give a command the options of an authority."""
    for option in (
        click.option("--agree-tos", is_flag=True, help="Agree to the authority's terms of service."),
        click.option(
            "--roots",
            type=click.Path(path_type=Path, exists=True, dir_okay=False),
            metavar="FILE",
            help="Trusted roots (PEM) of a private authority.",
        ),
        click.option(
            "--directory",
            default=LETS_ENCRYPT,
            metavar="URL",
            help="Directory of the authority. Default: Let's Encrypt.",
        ),
    ):
        command = option(command)
    return command


def taken_authority(values: dict[str, Any]) -> AuthorityOptions:
    """Remove the values of ``authority_options`` from ``values``, and return them."""
    return AuthorityOptions(
        directory=values.pop("directory"), roots=values.pop("roots"), agree_tos=values.pop("agree_tos")
    )


@click.command()
@authority_options
@click.argument("email", metavar="EMAIL")
@click.pass_obj
def acme(options: HostOptions, /, email: str, **wanted: Unpack[AuthorityOptions]) -> None:
    """Set the authority for certificates (ACME).

    The leader orders a certificate for each host name of a service, and renews it.

    \b
    Examples:
      skep door acme ops@example.com --agree-tos
      skep door acme ops@example.com --directory https://ca.internal/acme/acme/directory --roots ca.pem
    """
    run_requests(set_authority(options, email, **wanted))


async def set_authority(
    options: HostOptions, email: str, *, directory: str, roots: Path | None, agree_tos: bool
) -> None:
    """Set the authority, and print which one it is."""
    body = {
        "Email": email,
        "Directory": directory,
        "Roots": roots.read_text() if roots is not None else "",
        "AgreeTos": agree_tos,
    }
    async with options.requests() as client:
        await client.post("/skep/certificates/authority", body, timeout_s=_AUTHORITY_S)
    click.echo(f"Certificates are ordered from {directory}")


@click.group()
def certificate() -> None:
    """Manage certificates of host names.

    \b
    Examples:
      skep certificate ls
      skep certificate renew app.example.com
    """


@certificate.command()
@shows
@click.pass_obj
def ls(options: HostOptions, output: OutputOptions) -> None:
    """List certificates.

    \b
    Example:
      skep certificate ls
    """

    async def fetch() -> Shown:
        async with options.requests() as client:
            return shown_list(await client.get("/skep/certificates"))

    output.show(fetch)


def shown_list(found: Mapping[str, Any]) -> Shown:
    """Return the list of certificates.  Lines below the table say what fails."""
    rows = certificate_rows(found)

    def lines(screen: Screen) -> Iterator[str]:
        cells = [tuple(printable(str(value)) for value in row.values()) for row in rows]
        names = ("NAME", "STATE", "FROM", "EXPIRES", "NEXT ATTEMPT", "LAST ERROR")
        yield from table(names, cells, screen, empty="No certificates: no service has a host name.")
        yield from authority_problem(found.get("Authority"))

    return Shown(data=found, rows=rows, lines=lines)


def certificate_rows(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the certificates as rows."""
    return [
        {
            "Name": one["Name"],
            "State": _state(one),
            "From": _source(one, has_authority=found.get("Authority") is not None),
            "Expires": _minute(one.get("NotAfter", "")),
            "NextAttempt": _minute(one.get("NextAttemptAt", "")),
            "Error": one.get("Error") or "-",
        }
        for one in found["Certificates"]
    ]


def _state(one: Mapping[str, Any]) -> str:
    if not one["IsWanted"]:
        return "unused"
    order = one.get("Order")
    return f"{one['State']}: {order}" if order else str(one["State"])


def _source(one: Mapping[str, Any], *, has_authority: bool) -> str:
    if secret := one.get("Secret"):
        return f"secret {secret}"
    return "ACME" if has_authority or one.get("NotAfter") else "none"


def certificate_problems(found: Mapping[str, Any] | None) -> list[str]:
    """Return the problems of certificates as sentences, and of the authority if there is one."""
    if found is None:
        return []
    rows = [
        f"Certificate of {row['Name']}: {row['Error']}"
        for row in certificate_rows(found)
        if row["Error"] != "-"
    ]
    return [*rows, *(authority_problem(found["Authority"]) if found.get("Authority") else ())]


def authority_problem(authority: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield why no certificates are ordered now."""
    if authority is None:
        yield "No authority is configured. Set one with skep door acme EMAIL."
    elif error := authority.get("Error"):
        since, due = _minute(authority.get("FailingSince", "")), _minute(authority.get("NextAttemptAt", ""))
        yield printable(
            f"{authority['Directory']} fails since {since} UTC: {error}, next attempt at {due} UTC"
        )


def _minute(at: str) -> str:
    return at[:16].replace("T", " ") or "-"


@certificate.command()
@click.argument("name")
@click.pass_obj
def renew(options: HostOptions, name: str) -> None:
    """Renew a certificate now.

    Does not wait for it. Limits of the authority still apply.

    \b
    Example:
      skep certificate renew app.example.com
    """

    async def ask() -> None:
        async with options.requests() as client:
            await client.post(f"/skep/certificates/{quote(name, safe='')}/renew")

    run_requests(ask())
    click.echo(name)
