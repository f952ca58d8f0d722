/** The effects of actions in words, and the specs that actions send.  No DOM here. */

/**
 * Why a session may not make a change, or "".  `role`: `operator` (of the cluster or the stack) or `admin`.
 * The API decides; this spares the user a dialog that ends in a refusal.
 */
export function missingRole({ by_login: isByLogin, roles }, { role, stack = "" }) {
  const enough = role === "admin" ? ["admin"] : ["admin", "operator", ...(stack ? [`operator:${stack}`] : [])];
  if (!isByLogin || roles.some((one) => enough.includes(one))) return "";
  return `You need the role ${role} to change this. You are ${roles.join(", ") || "without a role"}.`;
}

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

/** The spec with which all tasks are replaced. */
export function restarted(spec) {
  const task = spec.TaskTemplate;
  return { ...spec, TaskTemplate: { ...task, ForceUpdate: (task.ForceUpdate ?? 0) + 1 } };
}

/** Throws if `part` of a service is not as it was when the dialog showed it (`shown`, null if it could not be read). */
export function requireSame(shown, present, part) {
  if (shown === null || JSON.stringify(part(shown)) === JSON.stringify(part(present))) return;
  throw new Error(`${present.Spec.Name} has changed since this dialog was opened. Nothing was done. Open it again.`);
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

/** The course of an update of `tasks` tasks, by the spec's update configuration. */
export function course(spec, tasks) {
  const { Parallelism: parallelism = 1, Order: order = "stop-first", FailureAction: failure = "pause", Delay: delay = 0 } = spec.UpdateConfig ?? {};
  const step = parallelism === 0 ? "all at once" : parallelism === 1 ? "one after the other" : `${parallelism} at a time`;
  const pause = delay ? `, ${Math.round(delay / 1e9)} s between steps` : "";
  const first = order === "start-first" ? "a new task starts before the old one stops" : "the old task stops before the new one starts";
  const then = { pause: "A failure pauses the update", rollback: "A failure rolls it back", continue: "Failures are ignored" }[failure] ?? failure;
  return `${tasks} ${tasks === 1 ? "task is" : "tasks are"} replaced ${step}${pause}, and ${first}. ${then}.`;
}

/**
 * The effect of draining a node with these tasks (`[{service, count}]`): `{move, end}`, the services whose tasks start on
 * other nodes, and the global services whose tasks end.
 */
export function whenDrained(groups) {
  const words = ({ service, count }) => `${service.name}${count > 1 ? ` ×${count}` : ""}`;
  const isGlobal = ({ service }) => service.mode.startsWith("global");
  return { move: groups.filter((group) => !isGlobal(group)).map(words), end: groups.filter(isGlobal).map(words) };
}

/** The quorum after a change of a manager's role: `{managers, survives, warning}`. */
export function quorumAfter({ total, reachable }, change, isReachable) {
  const managers = total + change;
  const up = reachable + (isReachable ? change : 0);
  const needed = Math.floor(managers / 2) + 1;
  const survives = Math.max(0, up - needed);
  const warning = managers < 1
    ? "You cannot demote the last manager."
    : up < needed
      ? "The remaining managers would have no majority, and no change would be possible."
      : managers % 2 === 0
        ? `${managers} managers survive as many losses as ${managers - 1}, so use an odd number.`
        : "";
  return { managers, survives, warning };
}
