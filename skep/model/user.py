"""Users of the API: their roles, and their credentials."""

import msgspec

from skep.model.access import Binding
from skep.model.encoding import ApiObject, always
from skep.model.ids import UserId
from skep.model.meta import Version
from skep.model.times import ZERO_TIME, Timestamp


class UserSpec(ApiObject):
    """What an administrator asks for."""

    name: str = ""
    roles: tuple[str, ...] = always(())
    """As ``model.access.Binding`` is written: ``operator:shop``."""


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
    """Whether it opens the dashboard and nothing else: a token that is typed into a page is no key to the API."""


class User(ApiObject):
    """A user of the API.  Writer: API."""

    id: UserId
    version: Version = always(Version())
    created_at: Timestamp = always(ZERO_TIME)
    updated_at: Timestamp = always(ZERO_TIME)
    spec: UserSpec = always(UserSpec())
    certificates: tuple[UserCertificate, ...] = always(())
    tokens: tuple[UserToken, ...] = always(())


class Credentials(msgspec.Struct, frozen=True, kw_only=True):
    """What the node process needs of a user.  Times are unix nanoseconds."""

    name: str
    bindings: tuple[Binding, ...]
    serials: dict[str, int]
    """Of certificates -> when they end."""
    tokens: dict[str, int]
    """Digests -> when they end."""
    logins: frozenset[str] = frozenset()
    """Digests of the tokens that only open the dashboard."""


class AccessTable(msgspec.Struct, frozen=True, kw_only=True):
    """What a manager sends to the node process of its machine, whenever it changes.

    ``root_pem``: of the users' certificates; empty: there are none.  ``is_current``: whether the manager sees
    removals; one without contact to the others does not.
    """

    root_pem: str = ""
    users: tuple[Credentials, ...] = ()
    is_current: bool = True
