"""``skep backup`` and ``skep restore``: the whole swarm in one encrypted file."""

import asyncio
import base64
import getpass
import os
import sys
import warnings
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Literal

import click

from skep.api.backups import (
    KEY_HEADER,
    BackupHeader,
    BackupManifest,
    BackupRequest,
    Opener,
    RestorePlan,
    key_of,
    new_header,
    parsed_opening,
)
from skep.cli import options
from skep.cli.endpoint import HostOptions
from skep.cli.running import errors_shown
from skep.errors import InvalidArgument, Unavailable, reason_of
from skep.linux.files import sync_directory, sync_file
from skep.model.values.counts import counted

_RESTORE_S = 300.0
"""Seconds for the response to an upload: the node decrypts the snapshot, writes it to disk and starts etcd on it."""
_READ_BYTES = 1024 * 1024
"""Bytes read at a time.  A backup may be larger than memory."""

Secret = tuple[Literal["scrypt", "hkdf"], bytes]
"""The function that derives a file's key, and the secret from which it is derived."""


def _secret_options(command: Any) -> Any:
    command = click.option(
        "--key-file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Use this file of at least 32 random bytes instead of a passphrase.",
    )(command)
    return click.option(
        "--passphrase-file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="Read the passphrase from this file's first line.",
    )(command)


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@_secret_options
@click.pass_obj
def backup(host: HostOptions, file: Path, passphrase_file: Path | None, key_file: Path | None) -> None:
    """Back up the cluster to an encrypted file.

    The cluster keeps running.

    You can run it on any manager, even without a quorum. FILE contains all secrets and the key of the root certificate,
    so store FILE and its passphrase in different places. FILE appears only when the backup is complete and verified.

    \b
    Examples:
      skep backup swarm.backup
      skep backup --key-file key /mnt/backups/swarm.backup
    """
    with errors_shown():
        asyncio.run(_check(host, file))
        secret = _secret(passphrase_file, key_file, confirm=True)
        manifest = asyncio.run(_backup(host, file, secret))
    click.echo(f"{file}: {_described(manifest.counts)}, incarnation {manifest.incarnation}")


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@_secret_options
@click.option(
    "--advertise-addr",
    default="",
    metavar="ADDRESS",
    help="Address where other nodes reach the restored manager.",
)
@options.dry_run("Show the content of the backup and the steps without restoring it.")
@options.yes
@click.pass_obj
def restore(
    host: HostOptions,
    file: Path,
    passphrase_file: Path | None,
    key_file: Path | None,
    advertise_addr: str,
    dry_run: bool,
    yes: bool,
) -> None:
    """Restore a cluster from a backup onto this node.

    The node must not be part of a cluster. It becomes the manager.

    It replaces the manager that made the backup. Other managers that still run stop when they connect to it.

    \b
    Examples:
      skep restore --dry-run swarm.backup
      skep restore --advertise-addr 10.0.0.7 swarm.backup
    """
    with errors_shown():
        _check_kind(file, passphrase_file, key_file)
        secret = _secret(passphrase_file, key_file, confirm=False)
        plan = asyncio.run(_restore(host, file, secret, advertise_addr, is_dry=True))
        for title, text in _about(plan):
            click.echo(f"{title:<12}{text}")
        if dry_run:
            return
        if not yes:
            click.confirm("Restore the cluster onto this node?", abort=True)
        asyncio.run(_restore(host, file, secret, advertise_addr, is_dry=False))
    click.echo(f"Swarm restored: current node ({plan.node_id}) is now its manager.")
    for line in _for_the_workers(plan.advertise_addr):
        click.echo(line)
    click.echo(
        "Nodes that you removed, demoted or evicted after the backup are members again. Repeat these commands."
    )


async def _check(host: HostOptions, file: Path) -> None:
    """Check, before the user types a passphrase, that the cluster sends a backup and that it can be written.

    Raises: SkepError; OSError.
    """
    if not file.parent.is_dir():
        raise InvalidArgument(f"{file.parent} is not a directory. Create it, or choose another place.")
    async with host.client() as client:
        await client.request("POST", "/skep/backup", query={"dryRun": "1"})


async def _backup(host: HostOptions, file: Path, secret: Secret) -> BackupManifest:
    """Write a backup and return its manifest.  Raises: SkepError."""
    header = new_header(secret[0])
    key = await asyncio.to_thread(key_of, secret[1], header)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    opener = Opener(key)
    try:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unwritable(file, error) from error
    try:
        with os.fdopen(descriptor, "wb") as out:
            async for piece in _pieces(host, BackupRequest(header=header, key=key)):
                opener.feed(piece)
                out.write(piece)
        manifest = opener.check_whole()
        sync_file(beside)
        beside.replace(file)
        sync_directory(file.parent)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _unwritable(file, error) from error
        raise
    return manifest


def _unwritable(file: Path, error: OSError) -> InvalidArgument:
    return InvalidArgument(f"cannot write {file}: {reason_of(error)}. Choose another place.")


async def _pieces(host: HostOptions, request: BackupRequest) -> AsyncIterator[bytes]:
    """Yield a backup as it arrives.  Raises: Unavailable: its manager ended it early; SkepError."""
    is_begun = False
    try:
        async with (
            host.client() as client,
            client.stream("/skep/backup", method="POST", body=request) as stream,
        ):
            async for piece in stream.pieces():
                is_begun = True
                yield piece
    except Unavailable as error:
        if not is_begun:
            raise
        raise Unavailable(
            "the manager ended the backup before it was complete. Run skep status to see why, and try again."
        ) from error


async def _restore(
    host: HostOptions, file: Path, secret: Secret, advertise_addr: str, *, is_dry: bool
) -> RestorePlan:
    header = _header(file)
    key = await asyncio.to_thread(key_of, secret[1], header)
    query = {"dryRun": "1"} if is_dry else {}
    if advertise_addr:
        query["advertiseAddr"] = advertise_addr
    async with host.client() as client:
        return await client.upload(
            RestorePlan,
            "/skep/restore",
            _content(file),
            headers={KEY_HEADER: base64.b64encode(key).decode()},
            timeout_s=_RESTORE_S,
            **query,
        )


def _check_kind(file: Path, passphrase_file: Path | None, key_file: Path | None) -> None:
    """Check, before the user types a passphrase, that the file is a backup with such a key.

    Raises: InvalidArgument.
    """
    kdf = _header(file).kdf
    if kdf != ("scrypt" if key_file is None else "hkdf"):
        made = "a passphrase (--passphrase-file)" if kdf == "scrypt" else "a key file (--key-file)"
        raise InvalidArgument(f"{file} was made with {made}. Use the same.")


def _header(file: Path) -> BackupHeader:
    """Read a backup's header.  Raises: InvalidArgument: the file is not a backup."""
    with file.open("rb") as source:
        parsed = parsed_opening(source.read(4096) or b"?")
    if parsed is None:
        raise InvalidArgument("the backup is damaged or incomplete. Use another file.")
    return parsed[0]


async def _content(file: Path) -> AsyncIterator[bytes]:
    with file.open("rb") as source:
        while piece := await asyncio.to_thread(source.read, _READ_BYTES):
            yield piece


def _secret(passphrase_file: Path | None, key_file: Path | None, *, confirm: bool) -> Secret:
    if key_file is not None:
        return "hkdf", key_file.read_bytes()
    if passphrase_file is not None:
        passphrase = passphrase_file.read_text().partition("\n")[0]
    else:
        passphrase = _prompted(confirm=confirm)
    if not passphrase:
        raise InvalidArgument("The passphrase is empty. Enter one, or use --key-file.")
    return "scrypt", passphrase.encode()


def _prompted(*, confirm: bool) -> str:
    """Ask for the passphrase.  Raises: InvalidArgument: the input ends, as in a cron job."""
    try:
        with warnings.catch_warnings(action="ignore", category=getpass.GetPassWarning):
            return str(click.prompt("Passphrase", hide_input=True, confirmation_prompt=confirm))
    except click.Abort as error:
        if sys.stdin.isatty():
            raise
        raise InvalidArgument("No passphrase was given. Use --passphrase-file or --key-file.") from error


def _for_the_workers(addr: str) -> Iterator[str]:
    """Return the next steps if no manager had this address before, because workers cannot find it by themselves."""
    yield ""
    yield f"Workers connect to the addresses of the former managers. If none of these was {addr}, add this line"
    yield "to /etc/skep/skep.toml on each worker, and run systemctl restart skep there. Containers keep running."
    yield ""
    yield f'    managers = ["{addr}"]'


def _about(plan: RestorePlan) -> Iterator[tuple[str, str]]:
    yield "swarm", f"{plan.cluster_id}, incarnation {plan.incarnation}"
    created = f"{plan.created_at[:19].replace('T', ' ')} UTC"
    yield "created", f"{created} by {plan.hostname} ({plan.node_id}), skep {plan.skep_version}"
    yield "content", _described(plan.counts)
    outcome = (
        f"This node becomes {plan.node_id} at {plan.advertise_addr}, the only manager of the swarm. Other managers are "
        "unreachable until you remove them. Workers look for it at the addresses of their former managers. If the "
        "former cluster still runs and this node can reach it, its managers stop, and its workers connect here."
    )
    yield "result", outcome


def _described(counts: Any) -> str:
    return ", ".join(counted(count, name.removesuffix("s")) for name, count in counts.items())
