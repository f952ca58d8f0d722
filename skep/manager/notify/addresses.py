"""Addresses of targets: which kind of receiver a URL names, and how it is shown without credentials.  Pure."""

import re
from enum import Enum
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

import msgspec

from skep.errors import InvalidArgument

URL_CHARACTERS_MAX = 2048
"""Longest URL.  Servers refuse longer ones."""
SECRET_CHARACTERS_MAX = 1024
"""Longest secret.  Tokens are shorter."""
_MAIL_PORTS = {"smtp": 587, "smtps": 465}
"""Ports of mail submission.  Source: RFC 6409 and RFC 8314."""
_MAIL_ADDRESS = re.compile(r"[A-Za-z0-9.!#$%&*+/=?^_{|}~-]{1,64}@[A-Za-z0-9.-]{1,253}")
"""Addresses without quotes.  Nothing in them ends a command of SMTP."""
_FORMS = (
    "https://HOST/PATH, slack+https://HOST/PATH, matrix+https://HOST/!ROOM:SERVER or "
    "smtps://USER@HOST?from=ADDRESS&to=ADDRESS"
)


class TargetKind(Enum):
    """Form in which a target gets its messages."""

    WEBHOOK = "webhook"
    SLACK = "slack"
    MATRIX = "matrix"
    MAIL = "mail"


class TargetAddress(msgspec.Struct, frozen=True, kw_only=True):
    """A parsed URL.

    Attributes:
        url: URL for HTTP, without the prefix of the scheme.  Empty for mail.
        room: Matrix room.
        user: User at the mail server, or empty to send without authentication.
        is_tls: Whether the connection starts with TLS.  Other mail connections use STARTTLS.
    """

    kind: TargetKind
    host: str
    port: int
    is_tls: bool
    url: str = ""
    room: str = ""
    user: str = ""
    sender: str = ""
    recipients: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """Return the address without parts that may be credentials: the path, the query and the user."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        if self.kind is TargetKind.MAIL:
            return f"{', '.join(self.recipients)} by {host}:{self.port}"
        if self.kind is TargetKind.MATRIX:
            return f"{self.room} on {host}:{self.port}"
        return f"{'https' if self.is_tls else 'http'}://{host}:{self.port}"


def parsed_address(url: str) -> TargetAddress:
    """Parse the URL of a target.  Raises: InvalidArgument, without the URL, which may have credentials."""
    if len(url) > URL_CHARACTERS_MAX or not url.isascii() or not url.isprintable() or " " in url:
        raise InvalidArgument(
            f"a URL of a target has at most {URL_CHARACTERS_MAX} printable ASCII characters"
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise InvalidArgument(f"the URL of the target is not valid: use {_FORMS}") from error
    form, _, scheme = parts.scheme.rpartition("+")
    if not parts.hostname:
        raise InvalidArgument(f"the URL of the target has no host: use {_FORMS}")
    if scheme in _MAIL_PORTS and not form:
        return _mail(parts, port or _MAIL_PORTS[scheme])
    if scheme not in ("http", "https") or form not in ("", "slack", "matrix"):
        raise InvalidArgument(f"unknown scheme {parts.scheme!r}: use {_FORMS}")
    if parts.username is not None or parts.password is not None:
        raise InvalidArgument("a web address has no user or password: use --secret")
    kind = {"": TargetKind.WEBHOOK, "slack": TargetKind.SLACK, "matrix": TargetKind.MATRIX}[form]
    room = _room(parts) if kind is TargetKind.MATRIX else ""
    plain = parts._replace(scheme=scheme, fragment="")
    return TargetAddress(
        kind=kind,
        host=parts.hostname,
        port=port or (443 if scheme == "https" else 80),
        is_tls=scheme == "https",
        url=plain._replace(path="", query="").geturl() if room else plain.geturl(),
        room=room,
    )


def _room(parts: SplitResult) -> str:
    room = unquote(parts.path.strip("/") + (f"#{parts.fragment}" if parts.fragment else ""))
    if not room.startswith("!") or "/" in room:
        raise InvalidArgument(
            "the path of a Matrix target is the id of a room, such as !abc:example.org, not an alias: "
            "see the room's advanced settings"
        )
    return room


def _mail(parts: SplitResult, port: int) -> TargetAddress:
    query = parse_qs(parts.query)
    senders, recipients = query.pop("from", []), query.pop("to", [])
    addresses = tuple(one.strip() for text in recipients for one in text.split(",") if one.strip())
    if query or parts.path not in ("", "/") or len(senders) != 1 or not addresses:
        raise InvalidArgument(
            "a mail target has one sender and recipients: smtps://HOST?from=ADDRESS&to=ADDRESS"
        )
    for address in (*senders, *addresses):
        if not _MAIL_ADDRESS.fullmatch(address):
            raise InvalidArgument(f"{address!r} is not a mail address")
    if parts.password is not None:
        raise InvalidArgument("the URL of a mail target has no password: use --secret")
    return TargetAddress(
        kind=TargetKind.MAIL,
        host=parts.hostname or "",
        port=port,
        is_tls=parts.scheme == "smtps",
        user=unquote(parts.username or ""),
        sender=senders[0],
        recipients=addresses,
    )


def check_secret(address: TargetAddress, secret: str) -> None:
    """Check that the secret fits the kind of target.  Raises: InvalidArgument."""
    if len(secret) > SECRET_CHARACTERS_MAX or not secret.isprintable() or not secret.isascii():
        raise InvalidArgument(f"a secret has at most {SECRET_CHARACTERS_MAX} printable ASCII characters")
    match address.kind:
        case TargetKind.SLACK if secret:
            raise InvalidArgument("the URL of a Slack target is its secret: leave out --secret")
        case TargetKind.MATRIX if not secret:
            raise InvalidArgument("a Matrix target needs the access token of its user: --secret TOKEN")
        case TargetKind.MAIL if bool(address.user) != bool(secret):
            raise InvalidArgument("a mail server needs both a user in the URL and a --secret, or neither")
