"""Measures of a whole service: requests over front doors, and answers to queries.  Pure."""

from collections.abc import Collection, Iterator

from skep.manager.autoscaling.decision import Measure
from skep.model.measures.readings import QueryAnswer, ScalingMeasurements
from skep.model.options.autoscaling import Autoscaling
from skep.model.values.ids import NodeId, ServiceId


def totals_of(
    id: ServiceId, scaling: Autoscaling, found: ScalingMeasurements, proxies: Collection[NodeId]
) -> Iterator[Measure]:
    """Yield the measures of a service.  ``proxies``: nodes on which a task of the front door runs."""
    targets = {"requests": scaling.requests, "rps": scaling.rps}
    reports = {node: one for node, one in found.requests.get(id, {}).items() if node in proxies}
    silent = len(proxies) - len(reports)
    problem = f"no report of the front door on {silent} of {len(proxies)} nodes" if silent else ""
    if not proxies:
        problem = "no task of the front door runs"
    for name, target in targets.items():
        if target is not None:
            figures = [one.in_flight if name == "requests" else one.per_second for one in reports.values()]
            yield Measure(name=name, target=target, sum=sum(figures), is_total=True, problem=problem)
    for name, one in scaling.queries.items():
        answer = found.answers.get(id, {}).get(name, QueryAnswer())
        figure = answer.valid
        waits = ", and no command runs while no task does" if one.query.command else ""
        problem = "" if figure is not None else answer.problem or f"not answered yet{waits}"
        yield Measure(name=name, target=one.target, sum=figure or 0.0, is_total=True, problem=problem)
