"""Users' credentials: a renewal gives a user no more than an administrator did, and takes no other one away."""

import pytest

from skep.aio.clock import SystemClock
from skep.errors import InvalidArgument, NotFound
from skep.manager.control import users as control
from skep.model.permissions.user import User, UserSpec
from skep.model.values.ids import new_id
from skep.model.values.times import SECOND_NS, Timestamp, timestamp, unix_ns
from skep.security.authority import Authority
from skep.security.keys import new_private_key, signing_request
from skep.store.level import USERS
from skep.store.memory import MemoryStore

NOW = Timestamp("2026-01-02T03:04:05Z")
DAY_S = 86400
ROOT = Authority.create(name=control.ROOT_NAME)
REQUEST = signing_request(new_private_key())


def after(days: float) -> Timestamp:
    return timestamp(unix_ns(NOW) + int(days * DAY_S) * SECOND_NS)


class Rig:
    def __init__(self) -> None:
        self.store = MemoryStore(SystemClock())

    async def a_user(self) -> User:
        await self.store.update(lambda tx: tx.raise_level(USERS))
        spec = UserSpec(name="ann", roles=("viewer",))
        return await self.store.update(control.create_user, spec, new_id=new_id, now=NOW)

    async def issue(self, user: User, days: float, now: Timestamp = NOW) -> User:
        lifetime_s = int(days * DAY_S)
        issued, _, _ = await self.store.update(
            control.add_certificate, user.id, REQUEST, lifetime_s, ROOT, now=now
        )
        return issued

    async def renew(self, user: User, serial: str, lifetime_s: int = 0, now: Timestamp = NOW) -> User:
        renewed, _, _ = await self.store.update(
            control.renew_certificate, user.id, serial, REQUEST, lifetime_s, ROOT, now=now
        )
        return renewed


async def test_a_renewed_certificate_lives_no_longer_than_the_one_that_asks() -> None:
    rig = Rig()
    user = await rig.issue(await rig.a_user(), days=2)
    (first,) = user.certificates
    with pytest.raises(InvalidArgument, match="has a lifetime of 172800 s, which the next one cannot exceed"):
        await rig.renew(user, first.serial, 3 * DAY_S)
    _, second = (await rig.renew(user, first.serial, now=after(1))).certificates
    assert second.not_after == after(3)
    assert (await rig.renew(user, first.serial, DAY_S, now=after(1))).certificates[-1].not_after == after(2)


async def test_renewals_push_out_no_certificate_but_the_one_that_asks() -> None:
    rig = Rig()
    user = await rig.a_user()
    for _ in range(2):
        user = await rig.issue(user, days=30)
    owners, stolen = (one.serial for one in user.certificates)
    for _ in range(2 * control.KEPT_MAX):
        user = await rig.renew(user, stolen)
        if all(one.serial != stolen for one in user.certificates):
            stolen = user.certificates[-1].serial
    assert len(user.certificates) == control.KEPT_MAX
    assert owners in [one.serial for one in user.certificates]


async def test_a_certificate_that_has_ended_or_is_another_users_renews_nothing() -> None:
    rig = Rig()
    user = await rig.issue(await rig.a_user(), days=1)
    (first,) = user.certificates
    for serial, now in ((first.serial, after(2)), ("abc", NOW), ("", NOW)):
        with pytest.raises(NotFound, match="of user ann not found"):
            await rig.renew(user, serial, now=now)


async def test_a_token_of_the_dashboard_is_marked_for_the_node() -> None:
    rig = Rig()
    user = await rig.a_user()
    for token, logs_in_only in (("api", False), ("page", True)):
        user = await rig.store.update(
            control.add_token,
            *(user.id, token, DAY_S),
            logs_in_only=logs_in_only,
            new_id=new_id,
            now=NOW,
        )
    (ann,) = control.access_table(rig.store.view(), is_current=True).users
    assert set(ann.tokens) == {control.digest_of("api"), control.digest_of("page")}
    assert ann.logins == {control.digest_of("page")}
