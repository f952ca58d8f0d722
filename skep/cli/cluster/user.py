"""``skep user``: users of the API over TCP, and their credentials: certificates, tokens, docker contexts."""

import asyncio
import ssl
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click
import msgspec
from msgspec.structs import replace

from skep.aio.backoff import Backoff
from skep.api.client.raw import RawClient
from skep.cli import options
from skep.cli.endpoint import HostOptions
from skep.cli.output import OutputOptions, Screen, Shown, shows, table
from skep.cli.running import delete_each, run_requests, say
from skep.cli.start.contexts import DockerContext, DockerContexts
from skep.errors import InvalidArgument, SkepError, Unauthenticated, Unavailable
from skep.linux.files import replace_file
from skep.model.permissions.access import parse_binding
from skep.model.task_end import printable
from skep.model.values.times import minute

if TYPE_CHECKING:
    from skep.api.client.requests import PlainRequests

_KNOWN_WITHIN_S = 10.0
"""Seconds within which a node should know a new user.  Managers send users within milliseconds, and again every two
seconds.
"""
_FILES = ("ca.pem", "cert.pem", "key.pem")
"""Docker's names of the files, in contexts and in ``DOCKER_CERT_PATH``."""


class _Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """The destination of a certificate.  ``context``: name of a docker context to write.  ``out``: a folder."""

    context: str = ""
    out: Path | None = None
    address: str = ""
    ca: Path | None = None
    lifetime: float = 0
    """Seconds, or 0 for the default."""


_WithDays = options.accepting({"--days": "--lifetime"})
_LIFETIME = options.Duration(plain_s=options.DAY_S, least_s=options.DAY_S, most_s=366 * options.DAY_S)


@click.group()
def user() -> None:
    """Manage users of the API.

    A role is viewer (read only), operator (changes services, networks, secrets and configs) or admin. Viewer and
    operator can be limited to a stack, such as operator:shop.

    \b
    Examples:
      skep user add ann --role operator:shop --context --address tcp://manager1:2376 --ca ca.pem
      skep user add ci --role operator:shop --token
      skep user rm ann
    """


_roles = click.option(
    "--role",
    "roles",
    multiple=True,
    required=True,
    metavar="ROLE[:STACK]",
    help="Role of the user. Repeat for several.",
)


@user.command(cls=_WithDays)
@_roles
@click.option("--token", "makes_token", is_flag=True, help="Create a token and print it once.")
@click.option("--context", "makes_context", is_flag=True, help="Create a docker context with a certificate.")
@click.option(
    "--out",
    metavar="DIRECTORY",
    type=click.Path(path_type=Path),
    help="Write ca.pem, cert.pem and key.pem to this directory.",
)
@click.option(
    "--address", default="", metavar="URL", help="Address of the API for the context: tcp://manager1:2376."
)
@click.option(
    "--ca",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="CA of the API's certificate (the node's setting tls-ca).",
)
@click.option(
    "--lifetime",
    type=_LIFETIME,
    default="30d",
    show_default=True,
    metavar="DURATION",
    help="Time until a certificate or token expires.",
)
@click.argument("name")
@click.pass_obj
def add(
    options: HostOptions,
    /,
    name: str,
    roles: tuple[str, ...],
    makes_token: bool,
    makes_context: bool,
    **where: Any,
) -> None:
    """Add a user and create credentials.

    \b
    Examples:
      skep user add ann --role viewer --context --address tcp://manager1:2376 --ca ca.pem
      skep user add bob --role operator:shop --role viewer:blog --out bob/ --ca ca.pem
      skep user add ci --role operator:shop --token --lifetime 90d
    """
    wanted = _Wanted(context=name if makes_context else "", **where)
    click.echo(run_requests(_add(options, name, roles, makes_token, wanted)))


async def _add(
    options: HostOptions, name: str, roles: tuple[str, ...], makes_token: bool, wanted: _Wanted
) -> str:
    """Add a user and return the text to print: the token, or the user's name.  An invalid command creates nothing."""
    for role in roles:
        parse_binding(role)
    has_certificate = bool(wanted.context or wanted.out)
    if not has_certificate and (wanted.address or wanted.ca is not None):
        raise InvalidArgument("--address and --ca are about a certificate. Add --context or --out DIRECTORY.")
    authority = _authority(options, wanted) if has_certificate else b""
    if wanted.context:
        async with RawClient(_address(options, wanted)):
            pass  # the address is valid
        DockerContexts(options.docker_folder).check_new(wanted.context)
    async with options.requests() as client:
        await client.post("/skep/users/create", {"Name": name, "Roles": roles})
        if has_certificate:
            key, certificate = await _issue(
                client, f"/skep/users/{quote(name)}/certificates", wanted.lifetime
            )
            _keep(options, wanted, (authority, certificate, key))
        printed = name
        if makes_token:
            body = {"LifetimeSeconds": int(wanted.lifetime)}
            printed = str((await client.post(f"/skep/users/{quote(name)}/tokens", body))["Token"])
    if wanted.context:
        await _wait_known(replace(options, host="", context=wanted.context))
    return printed


async def _wait_known(options: HostOptions) -> None:
    """Wait until the node of a new context accepts its user, or print the reason why it does not.

    It does not raise, because the user exists, and because the new token is printed afterwards.  The context may name
    another node than the node that added the user.  It learns of the user a moment later.
    """
    endpoint, backoff, error = options.endpoint(), Backoff(0.05, 1.0), ""
    try:
        async with asyncio.timeout(_KNOWN_WITHIN_S):
            while True:
                try:
                    async with endpoint.requests() as client:
                        await client.get("/skep/access")
                    return
                except SkepError as refusal:
                    error = str(refusal)
                    if not isinstance(refusal, Unauthenticated | Unavailable):
                        break
                await asyncio.sleep(backoff.next_delay_s())
    except TimeoutError:
        error = error or f"{endpoint.host} does not respond"
    say(f"The user was added, but the context does not work yet: {error}")


@user.command()
@_roles
@click.argument("name")
@click.pass_obj
def update(options: HostOptions, name: str, roles: tuple[str, ...]) -> None:
    """Replace the roles of a user.

    Closes the user's open connections.

    \b
    Example:
      skep user update ann --role viewer --role operator:shop
    """

    async def change() -> None:
        for role in roles:
            parse_binding(role)
        async with options.requests() as client:
            await client.post(f"/skep/users/{quote(name)}/update", {"Name": name, "Roles": roles})

    run_requests(change())
    click.echo(name)


@user.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.pass_obj
def rm(options: HostOptions, names: tuple[str, ...]) -> None:
    """Remove users and revoke their credentials.

    Closes the users' open connections.

    \b
    Example:
      skep user rm ann
    """

    run_requests(delete_each(options, "/skep/users", names))


@user.command()
@shows
@click.pass_obj
def ls(options: HostOptions, output: OutputOptions) -> None:
    """List users.

    \b
    Example:
      skep user ls
    """

    async def fetch() -> Shown:
        async with options.requests() as client:
            found = await client.get("/skep/users")
        rows = [
            {
                "Name": one["Spec"]["Name"],
                "Roles": ", ".join(one["Spec"]["Roles"]),
                "Certificates": len(one["Certificates"]),
                "Tokens": len(one["Tokens"]),
                "Expires": _expires(one)[:10] or "-",
            }
            for one in sorted(found, key=lambda one: str(one["Spec"]["Name"]))
        ]
        return _table(found, rows, "No users. Add one with skep user add NAME --role viewer --token.")

    output.show(fetch)


@user.command()
@click.argument("name")
@shows
@click.pass_obj
def inspect(options: HostOptions, name: str, output: OutputOptions) -> None:
    """Show a user with its certificates and tokens.

    The values of tokens are never shown.

    \b
    Example:
      skep user inspect ann -o json
    """

    async def fetch() -> Shown:
        async with options.requests() as client:
            found = await client.get(f"/skep/users/{quote(name)}")
        rows = [
            {
                "Kind": _kind(kind, one),
                "ID": one[key],
                "Created": minute(one["CreatedAt"]),
                "Expires": minute(one["NotAfter"]),
            }
            for kind, key, items in (
                ("certificate", "Serial", found["Certificates"]),
                ("token", "ID", found["Tokens"]),
            )
            for one in items
        ]
        empty = f"No certificates or tokens. Create a token with skep user token {name}."
        return _table(
            found, rows, empty, above=f"{found['Spec']['Name']}: {', '.join(found['Spec']['Roles'])}"
        )

    output.show(fetch)


def _kind(kind: str, credential: Mapping[str, Any]) -> str:
    return "dashboard token" if credential.get("LogsInOnly") else kind


@user.command(cls=_WithDays)
@click.option("--rm", "removed", metavar="ID", default="", help="Remove the token with this ID instead.")
@click.option(
    "--lifetime",
    type=_LIFETIME,
    default="90d",
    show_default=True,
    metavar="DURATION",
    help="Time until the token expires.",
)
@click.option("--dashboard", is_flag=True, help="Create a token for the dashboard only, not for the API.")
@click.argument("name")
@click.pass_obj
def token(options: HostOptions, name: str, removed: str, lifetime: float, *, dashboard: bool) -> None:
    """Create or remove a token.

    Prints the new token once. You cannot print it again.

    \b
    Examples:
      skep user token ci
      skep user token ann --dashboard
      skep user token ci --rm 7k2m9x4q1w
    """

    async def change() -> str:
        path = f"/skep/users/{quote(name)}/tokens"
        async with options.requests() as client:
            if not removed:
                wanted = {"LifetimeSeconds": int(lifetime), "LogsInOnly": dashboard}
                return str((await client.post(path, wanted))["Token"])
            await client.delete(f"{path}/{quote(removed)}")
            return removed

    click.echo(run_requests(change()))


@user.command(cls=_WithDays)
@click.option(
    "--out", metavar="DIRECTORY", type=click.Path(path_type=Path), help="Write the files to this directory."
)
@click.option("--for", "context", metavar="CONTEXT", default="", help="Write them to this docker context.")
@click.option(
    "--ca",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="CA of the API's certificate, with --out.",
)
@click.option(
    "--lifetime",
    type=_LIFETIME,
    metavar="DURATION",
    help="Time until the new certificate expires. Default: as before, or 30d for NAME.",
)
@click.argument("name", required=False)
@click.pass_obj
def renew(
    options: HostOptions, /, name: str | None, context: str, lifetime: float | None, **where: Any
) -> None:
    """Renew a certificate.

    Renews your own certificate, or as an administrator the certificate of NAME. The old certificate
    stays valid until it expires.

    \b
    Examples:
      skep --context ann user renew
      skep user renew ann --out ann/ --ca ca.pem
    """
    wanted = _Wanted(context=context or ("" if name else options.context), lifetime=lifetime or 0, **where)

    async def change() -> str:
        if not wanted.context and wanted.out is None:
            raise InvalidArgument(
                "Specify where to write the certificate, with --out DIRECTORY or --for CONTEXT."
            )
        authority = _authority(options, wanted) if wanted.out is not None else b""
        path = f"/skep/users/{quote(name)}/certificates" if name else "/skep/access/certificates"
        async with options.requests() as client:
            key, certificate = await _issue(client, path, wanted.lifetime)
        if wanted.context:
            files = {"cert.pem": certificate, "key.pem": key}
            DockerContexts(options.docker_folder).replace_tls(wanted.context, files)
        if wanted.out is not None:
            _write(wanted.out, (authority, certificate, key))
        return name or wanted.context

    click.echo(run_requests(change()))


@user.command()
@shows
@click.pass_obj
def whoami(options: HostOptions, output: OutputOptions) -> None:
    """Show your user and its roles.

    \b
    Example:
      skep --context ann user whoami
    """

    async def fetch() -> Shown:
        async with options.requests() as client:
            found = await client.get("/skep/access")
        return _table(found, [{**found, "Roles": ", ".join(found["Roles"])}])

    output.show(fetch)


async def _issue(client: "PlainRequests", path: str, lifetime: float) -> tuple[bytes, bytes]:
    """Create a key on this machine, request its certificate, and return both."""
    key, request = _key_and_request()
    body = {"Request": request.decode(), "LifetimeSeconds": int(lifetime)}
    return key, str((await client.post(path, body))["Certificate"]).encode()


def _key_and_request() -> tuple[bytes, bytes]:
    """Create a key and a certificate request, in PEM.  The cluster uses only the request's key, not its name."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return (
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
        request.public_bytes(serialization.Encoding.PEM),
    )


def _authority(options: HostOptions, wanted: _Wanted) -> bytes:
    """Return the CA of the API's certificate: the given CA, or the CA of this command's own connection."""
    tls = options.endpoint().tls
    path = wanted.ca or (tls.ca if tls is not None else None)
    if path is None:
        raise InvalidArgument(
            "Specify the CA of the API's certificate with --ca FILE (the node's setting tls-ca)."
        )
    content = path.read_bytes()
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=content.decode("ascii"))
    except (ValueError, ssl.SSLError) as error:  # not ASCII, empty, or not PEM
        raise InvalidArgument(
            f"{path} has no CA certificate in PEM format: {error}. Choose another file."
        ) from error
    return content


def _address(options: HostOptions, wanted: _Wanted) -> str:
    address = wanted.address or options.endpoint().host
    if not address.startswith("tcp://"):
        raise InvalidArgument(
            "Specify the address of the API for the context, such as --address tcp://manager1:2376."
        )
    return address


def _keep(options: HostOptions, wanted: _Wanted, content: tuple[bytes, bytes, bytes]) -> None:
    """Write the files to their destination.  ``content``: contents of ``_FILES``."""
    if wanted.out is not None:
        _write(wanted.out, content)
    if wanted.context:
        made = DockerContext(
            name=wanted.context, host=_address(options, wanted), description="Created by skep user add"
        )
        DockerContexts(options.docker_folder).create(made, dict(zip(_FILES, content, strict=True)))


def _write(folder: Path, content: Iterable[bytes]) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, data in zip(_FILES, content, strict=True):
        replace_file(folder / name, data, mode=0o600)


def _expires(user: Mapping[str, Any]) -> str:
    return max((str(one["NotAfter"]) for one in (*user["Certificates"], *user["Tokens"])), default="")


def _table(data: Any, rows: list[dict[str, Any]], empty: str = "", *, above: str = "") -> Shown:
    def lines(screen: Screen) -> Iterator[str]:
        if above:
            yield printable(above)
        names = list(rows[0]) if rows else ["Name"]
        cells = [tuple(str(value) for value in row.values()) for row in rows]
        yield from table(tuple(name.upper() for name in names), cells, screen, empty=empty)

    return Shown(data=data, rows=rows, lines=lines)
