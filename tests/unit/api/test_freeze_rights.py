"""Who may freeze: administrators the cluster, and operators of a stack that stack."""

from skep.api.access.permissions import KnownObject, RequestFacts, may, rule_for
from skep.model.permissions.access import Identity, Origin, parse_binding


def why_not(role: str, method: str, path: str, stack: str = "") -> str | None:
    identity = Identity(name="bob", origin=Origin.TOKEN, bindings=(parse_binding(role),))
    facts = RequestFacts(known=KnownObject(id=stack, stack=stack) if stack else None)
    return may(identity, rule_for(method, path), facts)


def test_the_cluster_is_frozen_by_administrators_only() -> None:
    for method in ("PUT", "DELETE"):
        for path in ("/skep/cluster/freeze", "/skep/cluster/window"):
            assert why_not("operator", method, path) == "only administrators may do this"


def test_a_stack_is_frozen_by_its_operators() -> None:
    for path in ("/skep/stacks/shop/freeze", "/skep/stacks/shop/window"):
        assert why_not("operator:shop", "PUT", path, "shop") is None
        assert why_not("operator", "DELETE", path, "shop") is None
        assert why_not("operator:blog", "PUT", path, "shop")
        assert why_not("viewer:shop", "PUT", path, "shop")


def test_every_user_reads_the_freezes_of_visible_stacks() -> None:
    assert why_not("viewer:shop", "GET", "/skep/cluster/freezes") is None
