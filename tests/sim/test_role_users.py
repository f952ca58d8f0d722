"""Users below root in simulated clusters: they act, and the rule finds what they change beyond their roles."""

import pytest
from msgspec.structs import replace

from sim.cluster import SimulatedCluster
from sim.users.clients import ApiClient, Apis
from sim.users.role_users import ROLE_LABEL, RoleUsers, nothing_beyond_roles
from skep.errors import PermissionDenied
from skep.model.permissions.access import Identity, Origin, parse_binding
from skep.model.permissions.user import User, UserSpec
from skep.model.secret import Config, Secret
from skep.model.service import Service
from skep.model.values.ids import ServiceId, UserId
from skep.model.values.stacks import STACK_LABEL
from tests.sim.histories import History
from tests.support.builders import a_service_spec


@pytest.mark.parametrize(
    ("role", "before", "stack", "is_wrong"),
    [
        ("viewer", "shop", "shop", True),
        ("operator:shop", "shop", "shop", False),
        ("operator:shop", "blog", "shop", True),
        ("operator:shop", "shop", "blog", True),
        ("operator:shop", "shop", "", True),
        ("admin", "shop", "blog", False),
    ],
)
def test_a_change_beyond_a_role_is_found(role: str, before: str, stack: str, is_wrong: bool) -> None:
    history = History(nothing_beyond_roles)
    spec = replace(a_service_spec("web", replicas=1), labels={STACK_LABEL: before})
    service = Service(id=ServiceId("web"), spec=spec)
    labels = {ROLE_LABEL: role, **({STACK_LABEL: stack} if stack else {})}
    history.put(service)
    history.put(replace(service, spec=replace(spec, labels=labels)))
    assert history.violations == ([f"{role} has changed service web"] if is_wrong else [])


def test_managers_refuse_a_user_of_the_simulation_as_they_refuse_a_real_one() -> None:
    with SimulatedCluster(managers=3, workers=2, seed=1) as cluster:
        cluster.run_for(5.0)
        identity = Identity(name="ann", origin=Origin.TOKEN, bindings=(parse_binding("viewer"),))
        client = ApiClient(Apis(cluster), "ann", identity)
        body = {"Name": "key", "Labels": {}, "Data": "aGk="}
        with pytest.raises(PermissionDenied):
            cluster.do(client.post("/secrets/create", body))


@pytest.mark.parametrize("role", ["viewer", "operator:shop"])
def test_users_act_within_their_roles(role: str) -> None:
    with SimulatedCluster(managers=3, workers=2, seed=2) as cluster:
        cluster.run_for(5.0)
        notes: list[str] = []
        acting = RoleUsers(cluster, cluster.random, notes.extend)
        user = User(id=UserId("u1"), spec=UserSpec(name="ann", roles=(role,)))
        cluster.write(lambda tx: tx.put(user))
        cluster.create(replace(a_service_spec("web", replicas=1), labels={STACK_LABEL: "blog"}))
        for _ in range(60):
            acting.act()
            cluster.run_for(0.2)
        cluster.do(acting.end())
        assert (cluster.observer.violations, notes) == ([], [])
        labels = [one.spec.labels for one in cluster.view.find(Secret)]
        labels += [one.spec.labels for one in cluster.view.find(Config)]
        assert {one[STACK_LABEL] for one in labels} == ({"shop"} if role != "viewer" else set())
        assert [one.spec.name for one in cluster.view.find(Service)] == ["web"]
