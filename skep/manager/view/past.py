"""Rows of the cluster in an earlier state, as a snapshot in the form of the current one."""

from skep.aio.clock import Clock
from skep.aio.time_slices import TimeSlices
from skep.manager.view.building import GLOBALS, RowBuilder, all_keys
from skep.manager.view.cluster import stored_cluster_row
from skep.manager.view.table import CLUSTER_KEY, Key, RowTableState
from skep.model.values.times import SECOND_NS
from skep.store.interface import View


async def snapshot_of(view: View, incarnation: int, at_s: float, clock: Clock) -> bytes:
    """Return all rows of ``view`` as one JSON object.  ``at_s`` is its Unix time in seconds."""
    now_ns = int(at_s * SECOND_NS)
    table, builder, slices = RowTableState(incarnation), RowBuilder(clock), TimeSlices(clock)
    keys = [key for key in all_keys(view) if key not in (CLUSTER_KEY, GLOBALS)]
    stacks: set[Key] = set()
    for key in sorted(
        keys, key=lambda key: key.kind != "services"
    ):  # Services come first, because other rows name them.
        if key.kind == "services":
            row, touched = await builder.service(view, key.id, now_ns)
            stacks |= {one for one in touched if one.kind == "stacks"}
        else:
            row, touched = builder.row(view, key)
            stacks |= touched
        table.put(key, row)
        await slices.yield_if_due()
    for key in stacks:
        table.put(key, builder.row(view, key)[0])
    table.put(CLUSTER_KEY, stored_cluster_row(view))
    table.step(view.revision, at_s)
    return table.snapshot()
