"""Affinities of services that no order of starts can satisfy are refused."""

import pytest
from msgspec.structs import replace

from skep.errors import FailedPrecondition, InvalidArgument
from skep.model.options.affinity import (
    AFFINITY,
    AFFINITY_PREFERRED,
    ANTI_AFFINITY,
    ANTI_AFFINITY_PREFERRED,
    MAX_SKEW,
)
from skep.model.options.dependencies import DEPENDS_ON
from skep.model.service import ServiceSpec
from skep.store.level import PLACEMENTS
from tests.support.builders import a_service_spec
from tests.unit.manager.control.test_control_services import create, update
from tests.unit.manager.control.test_control_services import store as store_of_lowest_level

__all__ = ["store_of_lowest_level"]

ZONE = "node.labels.zone"


@pytest.fixture
async def store(store_of_lowest_level):
    await store_of_lowest_level.update(lambda tx: tx.raise_level(PLACEMENTS))
    return store_of_lowest_level


def labeled(name: str, is_global: bool = False, **labels: str) -> ServiceSpec:
    names = {
        "near": AFFINITY,
        "apart": ANTI_AFFINITY,
        "prefer": AFFINITY_PREFERRED,
        "avoid": ANTI_AFFINITY_PREFERRED,
    }
    names |= {"skew": MAX_SKEW, "after": DEPENDS_ON}
    spec = a_service_spec(name, is_global=is_global)
    return replace(spec, labels={names[key]: value for key, value in labels.items()})


async def test_services_cannot_be_near_each_other_before_one_runs(store):
    await create(store, labeled("web", near=f"api@{ZONE}"))
    await create(store, labeled("api", near="db,api"))
    with pytest.raises(
        InvalidArgument, match=r"no task of these services could start first: db -> web -> api -> db"
    ):
        await create(store, labeled("db", near="web"))
    with pytest.raises(InvalidArgument, match=r"could start first: db -> api -> db"):
        await create(store, labeled("db", near="api", after="web=service_started"))
    database = await create(store, labeled("db", prefer="web"))
    with pytest.raises(InvalidArgument, match="could start first"):
        await update(store, database, labeled("db", near="web"))


async def test_a_service_cannot_wait_for_one_that_has_to_be_near_it(store):
    """The dependency comes last, and its spec has no affinity."""
    await create(store, labeled("web", near="api"))
    await create(store, labeled("api", after="queue=service_healthy"))
    with pytest.raises(InvalidArgument, match="could start first: queue -> web -> api -> queue"):
        await create(store, labeled("queue", after="web=service_started"))
    await create(store, labeled("queue", prefer="web"))


async def test_a_service_cannot_be_near_one_that_keeps_apart_from_it(store):
    await create(store, labeled("batch", apart=f"web@{ZONE}"))
    for near in ("batch", f"batch@{ZONE}"):
        with pytest.raises(InvalidArgument, match="affinities of web and batch contradict each other"):
            await create(store, labeled("web", near=near))
    await create(store, labeled("web", near="batch@node.labels.rack"))
    await create(store, labeled("shop", near="cache"))
    with pytest.raises(InvalidArgument, match="affinities of cache and shop contradict"):
        await create(store, labeled("cache", apart="shop"))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (labeled("web", True, skew=f"1@{ZONE}"), "does not work on global services"),
        (labeled("web", True, apart=f"web@{ZONE}"), "of a global service cannot name the service itself"),
        (labeled("web", prefer="WEB"), "cannot name the service itself"),
        (labeled("web", avoid=f"web@{ZONE}"), "use --placement-pref"),
        (labeled("web", near="db", apart="db"), "contradict each other"),
    ],
)
async def test_what_cannot_work_is_refused_by_name(store, spec, words):
    with pytest.raises(InvalidArgument, match=words):
        await create(store, spec)


async def test_the_labels_wait_for_all_managers(store_of_lowest_level):
    """An older leader would ignore them."""
    with pytest.raises(FailedPrecondition, match=r"skep\.anti-affinity needs managers of this version"):
        await create(store_of_lowest_level, labeled("web", apart="db"))
