/** What an action would change, in words, and the requests that do it.  No DOM here. */

/** The spec with another number of replicas. */
export function scaled(spec, replicas) {
  const mode = spec.Mode.Replicated ? { Replicated: { ...spec.Mode.Replicated, Replicas: replicas } } : spec.Mode;
  return { ...spec, Mode: mode };
}

/** The spec with another image. */
export function withImage(spec, image) {
  const task = spec.TaskTemplate;
  return { ...spec, TaskTemplate: { ...task, ContainerSpec: { ...task.ContainerSpec, Image: image } } };
}

/** The spec whose tasks are all made anew. */
export function restarted(spec) {
  const task = spec.TaskTemplate;
  return { ...spec, TaskTemplate: { ...task, ForceUpdate: (task.ForceUpdate ?? 0) + 1 } };
}

/**
 * How a planned placement (`{Desired, Nodes: [{NodeID, Hostname, Tasks}], Error}`) differs from the tasks there are
 * (`{node id: number}`): `[{node, hostname, before, after}]`, nodes with a difference first.
 */
export function difference(placement, before) {
  const rows = new Map();
  for (const { NodeID: node, Hostname: hostname, Tasks: after } of placement.Nodes ?? []) rows.set(node, { node, hostname, before: before.get(node) ?? 0, after });
  for (const [node, number] of before) if (node && !rows.has(node)) rows.set(node, { node, hostname: "", before: number, after: 0 });
  return [...rows.values()].sort((a, b) => Math.abs(b.after - b.before) - Math.abs(a.after - a.before));
}

/** How an update of `tasks` tasks would go, by the spec's update configuration. */
export function course(spec, tasks) {
  const { Parallelism: parallelism = 1, Order: order = "stop-first", FailureAction: failure = "pause", Delay: delay = 0 } = spec.UpdateConfig ?? {};
  const step = parallelism === 0 ? "all at once" : parallelism === 1 ? "one after the other" : `${parallelism} at a time`;
  const pause = delay ? `, ${Math.round(delay / 1e9)} s between steps` : "";
  const first = order === "start-first" ? "the new one is started before the old one is stopped" : "the old one is stopped before the new one is started";
  const then = { pause: "a failure pauses the update", rollback: "a failure rolls it back", continue: "failures are ignored" }[failure] ?? failure;
  return `${tasks} ${tasks === 1 ? "task is" : "tasks are"} replaced ${step}${pause}; ${first}; ${then}.`;
}

/**
 * What becomes of a node's tasks (`[{service row, number}]` as `{service, count}`) when it takes none any more:
 * `{move, end}`, the names with numbers of those that go to other nodes and of those that have no other node.
 */
export function whenDrained(groups) {
  const words = ({ service, count }) => `${service.name}${count > 1 ? ` ×${count}` : ""}`;
  const isGlobal = ({ service }) => service.mode.startsWith("global");
  return { move: groups.filter((group) => !isGlobal(group)).map(words), end: groups.filter(isGlobal).map(words) };
}

/** What a change of a manager's role means for the quorum: `{managers, survives, warning}`. */
export function quorumAfter({ total, reachable }, change, isReachable) {
  const managers = total + change;
  const up = reachable + (isReachable ? change : 0);
  const needed = Math.floor(managers / 2) + 1;
  const survives = Math.max(0, up - needed);
  const warning = managers < 1
    ? "This is the last manager: it cannot be demoted."
    : up < needed
      ? "The managers that are left would have no majority: every change would stop."
      : managers % 2 === 0
        ? `An even number of managers survives no more losses than ${managers - 1} would.`
        : "";
  return { managers, survives, warning };
}
