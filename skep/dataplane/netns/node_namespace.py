"""The node's own network namespace, in which others have devices and routes too."""

from skep.dataplane.netns.namespaces import Namespaces
from skep.dataplane.netns.reconciler import NetnsReconciler
from skep.dataplane.netns.repairs import Repairs
from skep.dataplane.netns.state import Link
from skep.dataplane.plan.overlay import INGRESS_BRIDGE, INGRESS_VXLAN, TAP


def node_reconciler(namespaces: Namespaces, repairs: Repairs) -> NetnsReconciler:
    """What is ours there.

    Until tables have come nobody knows what there belongs to no one, so nothing is removed.
    """
    return NetnsReconciler(
        "node",
        namespaces.home,
        namespaces,
        repairs,
        is_ours=False,
        selects=_is_of_ingress,
        has_own_routes=False,
    )


def _is_of_ingress(link: Link) -> bool:
    is_ours = link.name == INGRESS_BRIDGE or link.name.startswith(INGRESS_VXLAN)
    return is_ours or (link.kind in ("veth", TAP) and link.master == INGRESS_BRIDGE)
