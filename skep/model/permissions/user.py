"""Users of the API: their roles, and their credentials."""

import msgspec

from skep.model.permissions.access import Binding
from skep.model.values.encoding import ApiObject, always
from skep.model.values.ids import UserId
from skep.model.values.meta import Version
from skep.model.values.times import ZERO_TIME, Timestamp


class UserSpec(ApiObject):
    """The administrator's spec of a user."""

    name: str = ""
    roles: tuple[str, ...] = always(())
    """Role bindings as text (``model.permissions.access.Binding``), such as ``operator:shop``."""


class UserCertificate(ApiObject):
    """A certificate that the cluster issued.  ``serial``: in hexadecimal digits."""

    serial: str
    created_at: Timestamp = always(ZERO_TIME)
    not_after: Timestamp = always(ZERO_TIME)


class UserToken(ApiObject):
    """A token, of which only the digest (SHA-256, in hexadecimal digits) is kept."""

    id: str
    digest: str = always("")
    """Not shown by the API."""
    created_at: Timestamp = always(ZERO_TIME)
    not_after: Timestamp = always(ZERO_TIME)
    logs_in_only: bool = False
    """Whether it opens the dashboard only, so that a token typed into a page cannot be used for the API."""


class User(ApiObject):
    """A user of the API.  Writer: API."""

    id: UserId
    version: Version = always(Version())
    created_at: Timestamp = always(ZERO_TIME)
    updated_at: Timestamp = always(ZERO_TIME)
    spec: UserSpec = always(UserSpec())
    certificates: tuple[UserCertificate, ...] = always(())
    tokens: tuple[UserToken, ...] = always(())


class UserCredentials(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of a user that the node process needs.  Times are Unix nanoseconds."""

    name: str
    bindings: tuple[Binding, ...]
    serials: dict[str, int]
    """Expiry times of certificates, by serial number."""
    tokens: dict[str, int]
    """Expiry times of tokens, by digest."""
    logins: frozenset[str] = frozenset()
    """Digests of the tokens that only open the dashboard."""


class AccessTable(msgspec.Struct, frozen=True, kw_only=True):
    """The users' credentials, which a manager sends to its own node process whenever they change.

    ``root_pem``: the root of the users' certificates, or empty without any.  ``is_current``: whether the manager learns
    of removals, which it does not without contact to the other managers.
    """

    root_pem: str = ""
    users: tuple[UserCredentials, ...] = ()
    is_current: bool = True
