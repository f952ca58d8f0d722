"""Which role each endpoint needs, and what roles in single stacks reach."""

import importlib
import pkgutil
import re

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

import skep.engine.api
import skep.node.routes
from skep.api.access.permissions import (
    RULES,
    UNKNOWN,
    KnownObject,
    NewObject,
    PermissionScope,
    RequestFacts,
    is_name_of,
    may,
    rule_for,
    sees,
    why_not_ps,
)
from skep.api.http.tables import RouteTable
from skep.manager.routes import _TABLES
from skep.model.permissions.access import ALL, Binding, Identity, Origin, Role, parse_binding

NODE_TABLES = [
    value.bound(None)
    for package in (skep.engine.api, skep.node.routes, skep.node)
    for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    if not info.ispkg
    for value in vars(importlib.import_module(info.name)).values()
    if isinstance(value, RouteTable)
]
ROUTES = sorted(
    {
        (route.method, re.sub(r"\{(\w+)[^}]*\}", r"{\1}", route.path))
        for table in (*_TABLES, *NODE_TABLES)
        for route in table
        if isinstance(route, web.RouteDef)
    }
)
"""Of the manager process, and of the node process as far as they are written as tables."""

OF_ADMINISTRATORS = re.compile(
    r"""/_skep/.*  # on the manager's own socket
    |/build(/prune)?|/commit|/containers/.*|/exec/.*|/images/.*|/volumes.*|/networks/.*  # root of a machine
    |/swarm.*|/nodes/.*|/skep/(users|cluster|backup|restore|stacks|notify|certificates).*|/skep/access/certificates
    |/(images|volumes|containers|networks|system)/prune|/session|/grpc|/auth|/\{tail\}""",
    re.VERBOSE,
)


def a_user(*bindings: str) -> Identity:
    return Identity(name="ann", origin=Origin.TOKEN, bindings=tuple(map(parse_binding, bindings)))


def test_the_tables_of_routes_are_found() -> None:
    assert len(ROUTES) > 100


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_endpoint_has_a_rule_or_is_known_to_be_an_administrators(method: str, path: str) -> None:
    if rule_for(method, path) is UNKNOWN:
        assert OF_ADMINISTRATORS.fullmatch(path), (
            "decide who may do this: a rule in skep/api/access/permissions.py"
        )


@given(st.sampled_from(ROUTES), st.sampled_from(["viewer", "viewer:shop"]))
def test_a_viewer_never_changes_anything(route: tuple[str, str], role: str) -> None:
    method, path = route
    if may(a_user(role), rule_for(method, path)) is None:
        # A new certificate for itself changes no object that others have.
        assert method in ("GET", "HEAD") or path == "/skep/access/certificates"


@given(
    st.text(alphabet="/abcservicetaskwm{}.%", max_size=40), st.sampled_from(["GET", "POST", "PUT", "DELETE"])
)
def test_a_path_that_is_not_known_is_an_administrators(path: str, method: str) -> None:
    if not any(rule.pattern.fullmatch(f"/{path}") for rule in RULES):
        assert may(a_user("operator", "viewer"), rule_for(method, f"/{path}")) is not None


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/swarm/unlockkey"),
        ("POST", "/swarm/update"),
        ("POST", "/nodes/{id}/update"),
        ("POST", "/skep/users/create"),
        ("POST", "/containers/create"),
        ("GET", "/containers/{id}/archive"),
        ("POST", "/volumes/create"),
        ("POST", "/build"),
        ("POST", "/session"),
        ("POST", "/grpc"),
        ("GET", "/_skep/access"),
    ],
)
def test_an_operator_gets_no_rights_over_the_cluster_or_a_machine(method: str, path: str) -> None:
    assert may(a_user("operator"), rule_for(method, path)) == "only administrators may do this"
    admin = Identity(name="root", origin=Origin.SOCKET, bindings=ALL)
    assert may(admin, rule_for(method, path)) is None


@pytest.mark.parametrize(
    ("role", "is_allowed"), [("viewer", False), ("operator:shop", False), ("operator", True), ("admin", True)]
)
def test_the_throughput_of_the_clusters_links_is_tested_by_its_operators_alone(
    role: str, *, is_allowed: bool
) -> None:
    rule = rule_for("POST", "/skep/doctor/network")
    assert (may(a_user(role), rule) is None) == is_allowed
    assert may(a_user("viewer"), rule_for("GET", "/skep/doctor/network")) is None, "without throughput"


@pytest.mark.parametrize(
    "arguments",
    [
        *("", "-ef", "-e", "-f", "-eF", "-efL", "-el", "-efww", "aux", "auxww", "-aux", "axl", "axj"),
        *("-o pid,comm", "-eo pid,args", "-eopid,args", "-e -o pid,ppid,user:20,%cpu,args", "-A -o pid"),
        *("o pid,comm", "axo pid,comm", "ax -o pid,args", "-o pid -o comm"),
    ],
)
def test_users_choose_the_columns_of_ps(arguments: str) -> None:
    assert why_not_ps(arguments) == ""


@pytest.mark.parametrize(
    "arguments",
    [
        *("e", "eww", "-ef e", "auxe", "auxeww", "-auxe", "-efx", "-ecx", "eo pid,args", "axeo pid,args"),
        # Contradictions, after which ps reads -e as the environment.
        *("-ef -o pid,args", "-e -c -o pid,args", "-eco pid,args", "-ef aux", "-eLT", "-eLm"),
        *("-eo pid,environ", "-o environ", "--format=pid,args e", "--format pid,args"),
        # Titles of one's own, in all spellings.
        *(
            "-eorss=PID -oargs eww",
            "-e -o rss='PID' -o args",
            "-eetimes=PID",
            "-eo etimes=PID",
            "-o pid,rss=PID",
        ),
        *("--format=rss=PID", "o rss=PID", "-eo pid=,args", "-eo 'PID %c'", '-eo "rss=PID"', "-o\tpid"),
        # Other processes, or rows that no option keeps from them.
        *("-p 1", "p 1", "1", "-C sh", "-u root", "-N", "--deselect", "--ppid 1", "f", "-efH", "--forest"),
        *("--sort=pid", "k pid", "-q 1", "-q1", "h", "--no-headers", "-ef --no-headers"),
    ],
)
def test_what_shows_environments_or_other_processes_is_an_administrators(arguments: str) -> None:
    assert f"only administrators may run ps with {arguments!r}" in why_not_ps(arguments)


CREATE, UPDATE = rule_for("POST", "/services/create"), rule_for("POST", "/services/{id}/update")


def why(user: Identity, new: NewObject, known: KnownObject | None = None) -> str:
    rule = CREATE if known is None else UPDATE
    return may(user, rule, RequestFacts(known=known, new=(new,), stacks={"shop", "shop_eu", "blog"})) or ""


def test_what_is_new_belongs_to_the_stack_of_the_operator() -> None:
    shopper = a_user("operator:shop")
    assert why(shopper, NewObject(name="shop_web", stack="shop")) == ""
    assert "needs the label" in why(shopper, NewObject(name="shop_web"))
    assert "belongs to the stack blog" in why(shopper, NewObject(name="blog_web", stack="blog"))
    assert "begin with shop_" in why(shopper, NewObject(name="web", stack="shop"))


def test_the_names_of_a_stack_with_a_longer_name_are_not_taken() -> None:
    assert is_name_of("shop_eu_web", "shop_eu", {"shop", "shop_eu"})
    assert not is_name_of("shop_eu_web", "shop", {"shop", "shop_eu"})
    assert is_name_of("shop_eu_web", "shop", {"shop"})


@pytest.mark.parametrize(
    ("name", "is_shops"),
    [
        ("shop_data_{{.Task.Slot}}", True),
        ("shop_d{{.Service.Name}}", True),
        ('shop_{{"eu_data"}}', False),
        ("shop_ {{- .Node.Hostname}}", False),
        ("shop_e{{.Task.Slot}}", False),
        ("shop_eu{{.Task.Slot}}", False),
        ("shop_eu_data{{.Task.Slot}}", False),
        ('shop{{"_data"}}', False),
        ('{{"shop_data"}}', False),
    ],
)
def test_placeholders_do_not_make_a_name_one_of_another_stack(name: str, is_shops: bool) -> None:
    assert is_name_of(name, "shop", {"shop", "shop_eu", "blog"}) is is_shops
    refusal = why(a_user("operator:shop"), NewObject(name="shop_a", stack="shop", volumes=(name,)))
    assert (f"the name {name} is not one of the stack shop" in refusal) is not is_shops
    assert why(a_user("operator"), NewObject(name="shop_a", stack="shop", volumes=(name,))) == ""


def test_a_service_uses_what_is_of_its_stack_only() -> None:
    shopper = a_user("operator:shop")
    own, others = KnownObject(id="1", stack="shop"), KnownObject(id="2", stack="blog")
    assert why(shopper, NewObject(name="shop_a", stack="shop", uses=(("secret", own, "k"),))) == ""
    for used in (others, KnownObject(id="3"), None):
        refusal = why(shopper, NewObject(name="shop_a", stack="shop", uses=(("secret", used, "k"),)))
        assert refusal == "the secret k does not belong to the stack shop"
    assert "blog_data" in why(shopper, NewObject(name="shop_a", stack="shop", volumes=("blog_data",)))


def test_rights_over_machines_are_no_operators() -> None:
    for user in (a_user("operator"), a_user("operator:shop")):
        new = NewObject(name="shop_a", stack="shop", machine_rights="a bind mount of /")
        assert "a bind mount of /" in why(user, new)
        plain = NewObject(name="shop_a", stack="shop")
        known = KnownObject(id="1", stack="shop", machine_rights="a bind mount of /")
        assert "which only administrators may give" in why(user, plain, known)


def test_operators_of_single_stacks_put_no_service_before_those_of_others() -> None:
    raised = NewObject(name="shop_a", stack="shop", raised_priority=10)
    refusal = "priority 10: only users with a role in the whole cluster may give more than 0"
    assert why(a_user("operator:shop"), raised) == refusal
    assert why(a_user("operator:shop"), raised, KnownObject(id="1", stack="shop")) == refusal
    assert why(a_user("operator"), raised) == ""


def test_no_object_goes_to_another_stack() -> None:
    shopper = a_user("operator:shop", "viewer")
    assert "belongs to the stack blog" in why(
        shopper, NewObject(name="shop_a", stack="shop"), KnownObject(id="1", stack="blog")
    )
    known, moved = KnownObject(id="1", stack="shop_eu"), NewObject(name="shop_eu_web", stack="shop")
    for user in (a_user("operator:shop", "operator:shop_eu"), a_user("operator")):
        assert why(user, moved, known) == "only administrators may move a service to another stack"
        assert "to another stack" in why(user, NewObject(name="shop_eu_web"), known)
        assert why(user, NewObject(name="shop_eu_web", stack="shop_eu"), known) == ""
    admin = Identity(name="root", origin=Origin.SOCKET, bindings=ALL)
    assert why(admin, moved, known) == ""
    assert "to another stack" in why(
        shopper, NewObject(name="blog_a", stack="blog"), KnownObject(id="1", stack="shop")
    )
    assert "belongs to no stack" in why(shopper, NewObject(name="shop_a", stack="shop"), KnownObject(id="1"))


@given(st.lists(st.sampled_from(["viewer:shop", "operator:shop", "operator:blog"]), min_size=1))
def test_roles_in_stacks_never_reach_what_is_of_none(roles: list[str]) -> None:
    user = a_user(*roles)
    assert not sees(user, "")
    assert not sees(user, "other")
    for rule in RULES:
        if rule.scope is PermissionScope.OBJECT:
            assert may(user, rule, RequestFacts(known=KnownObject(id="x"))) is not None
        if rule.scope is PermissionScope.CLUSTER:
            assert may(user, rule) is not None


def test_a_role_in_the_cluster_reaches_every_stack() -> None:
    viewer = Identity(name="v", origin=Origin.NODE, bindings=(Binding(Role.VIEWER),))
    assert sees(viewer, "")
    assert sees(viewer, "shop")
    assert (
        may(viewer, rule_for("GET", "/services/{id}"), RequestFacts(known=KnownObject(id="x", stack="shop")))
        is None
    )
