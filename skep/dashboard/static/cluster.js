/** The cluster: the last snapshot with all later changes applied.  No DOM here. */

import { age, clockTime, count } from "./text.js";

export const KINDS = ["nodes", "services", "tasks", "networks", "stacks", "volumes", "secrets", "configs"];

const ENDED = new Set(["complete", "shutdown", "failed", "rejected", "remove", "orphaned"]);
const WRONG = new Set(["failed", "rejected", "orphaned"]);
const RFC_3339 = /\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?Z/;

export const isEnded = (task) => ENDED.has(task.state);
/** Whether a task counts for its service: it has not ended and is not replaced, as tasks of a lost node are. */
export const isCounted = (task) => !isEnded(task) && task.desired_state !== "shutdown" && task.desired_state !== "remove";
export const isWrong = (task) => WRONG.has(task.state);

/** How a task is drawn and named: `pending`, `starting`, `running`, `unhealthy`, `stopping`, `completed`, `failed` or `unknown`. */
export function phase(task) {
  if (task.state === "unknown") return "unknown";
  if (isWrong(task)) return "failed";
  if (ENDED.has(task.state)) return "completed";
  if (task.state === "running") {
    if (task.desired_state !== "running" && task.desired_state !== "complete") return "stopping";
    return task.health === "unhealthy" ? "unhealthy" : "running";
  }
  return task.node ? "starting" : "pending";
}

/** The rows of a cluster by kind and id, with indexes. */
export class Cluster {
  cursor = "";
  info = { id: "", name: "", managers: { total: 0, reachable: 0, leader: "" }, warnings: [], replacement_suspended: "" };
  /** Grows with every change; `versions` does so by kind. */
  version = 0;
  versions = Object.fromEntries(KINDS.map((kind) => [kind, 0]));
  #rows = Object.fromEntries(KINDS.map((kind) => [kind, new Map()]));
  #indexes = new Map();

  /** Replaces everything. */
  take(snapshot) {
    this.cursor = snapshot.cursor;
    if (snapshot.cluster) this.info = snapshot.cluster;
    for (const kind of KINDS) this.#rows[kind] = new Map((snapshot[kind] ?? []).map((row) => [row.id, row]));
    this.#changed(KINDS);
  }

  /** Applies one change, `{cursor, set: {kind: rows}, removed: {kind: ids}}`.  Rows are whole; applying it twice does no harm. */
  apply(change) {
    const touched = new Set();
    for (const [kind, ids] of Object.entries(change.removed ?? {})) {
      if (!Object.hasOwn(this.#rows, kind)) continue;
      for (const id of ids) this.#rows[kind].delete(id);
      touched.add(kind);
    }
    for (const [kind, rows] of Object.entries(change.set ?? {})) {
      if (kind === "cluster") this.info = rows;
      if (!Object.hasOwn(this.#rows, kind)) continue;
      for (const row of rows) this.#rows[kind].set(row.id, row);
      touched.add(kind);
    }
    this.cursor = change.cursor ?? this.cursor;
    this.#changed(touched);
  }

  #changed(kinds) {
    this.version += 1;
    for (const kind of kinds) this.versions[kind] = this.version;
  }

  /** The row of a kind with this id, or undefined. */
  get(kind, id) {
    return this.#rows[kind].get(id);
  }

  /** All rows of a kind. */
  all(kind) {
    return this.#index(`all ${kind}`, kind, (rows) => [...rows.values()]);
  }

  size(kind) {
    return this.#rows[kind].size;
  }

  /** `{value: rows}` of a kind by one of its fields. */
  by(kind, field) {
    return this.#index(`${kind} by ${field}`, kind, (rows) => {
      const groups = new Map();
      for (const row of rows.values()) {
        const group = groups.get(row[field]);
        if (group) group.push(row);
        else groups.set(row[field], [row]);
      }
      return groups;
    });
  }

  tasksOf(field, id) {
    return this.by("tasks", field).get(id) ?? [];
  }

  /** The name of a row, or the start of its id if it was removed. */
  name(kind, id) {
    return this.#rows[kind].get(id)?.name ?? (id ? id.slice(0, 12) : "–");
  }

  /** The name of a task as in Docker: `web.2`, or `web.HOST` for a global service. */
  taskName(task) {
    const service = this.#rows.services.get(task.service);
    const name = service?.name ?? (task.service ? task.service.slice(0, 12) : "container");
    const slot = this.slotOf(task);
    if (slot !== null) return `${name}.${slot}`;
    return task.node ? `${name}.${this.name("nodes", task.node)}` : name;
  }

  /** The slot of a task, or null for a task of a global service.  The slots of jobs begin at 0. */
  slotOf({ service, slot }) {
    return slot || (this.#rows.services.get(service)?.mode === "replicated-job" ? 0 : null);
  }

  #index(name, kind, make) {
    const known = this.#indexes.get(name);
    if (known?.version === this.versions[kind]) return known.value;
    const value = make(this.#rows[kind]);
    this.#indexes.set(name, { version: this.versions[kind], value });
    return value;
  }
}

/**
 * How far a service is, `{done, of, isJob}`: completed tasks of a job or of a service whose tasks end, else running
 * tasks.
 */
export function progress({ mode, running, desired, completed = 0, total = 0 }) {
  if (mode.endsWith("-job")) return { done: completed, of: total || desired, isJob: true };
  if (completed > 0) return { done: completed, of: desired, isJob: true };
  return { done: running, of: desired, isJob: false };
}

/** `2/3`, or `6/6 completed`. */
export function replicasText(service) {
  const { done, of, isJob } = progress(service);
  return `${done}/${of}${isJob ? " completed" : ""}`;
}

/** `2/3 running`, or `6/6 completed`. */
function progressInWords(service) {
  const { done, of, isJob } = progress(service);
  return `${done}/${of} ${isJob ? "completed" : "running"}`;
}

const URGENCY = { degraded: 0, converging: 1, healthy: 2 };

/** Orders services: degraded ones first, the oldest problem before others, then by name. */
export function byUrgency(a, b) {
  return URGENCY[a.state] - URGENCY[b.state] || (a.state === "healthy" ? 0 : (a.since || Infinity) - (b.since || Infinity) || 0) || (a.name < b.name ? -1 : 1);
}

/** `drained` or `paused` of a node that accepts no tasks, else `active`. */
export const availabilityText = ({ availability }) => ({ drain: "drained", pause: "paused" })[availability] ?? availability;

/** Why a node is not ready, and since when it has sent no heartbeat. */
export function lastHeard(node, now) {
  const at = node.last_heartbeat_at;
  return [node.reason, at && `no heartbeat since ${clockTime(at, now)} (${age(at, now)})`].filter(Boolean).join(", ");
}

/** A manager's warning without its first word, which is for terminals, and with times as the page shows them. */
const warningText = (warning, now) => warning.replace(/^WARNING: /, "").replace(RFC_3339, (at) => clockTime(at, now));

/**
 * What needs attention or is in progress: `{level: "bad"|"warn"|"busy", title, detail, target}`, problems first, then
 * warnings, then changes in progress.  The target is `[kind, id]` or null.
 */
export function problems(cluster, now = Date.now()) {
  const found = { bad: [], warn: [], busy: [] };
  const add = (level, title, detail, target = null) => found[level].push({ level, title, detail, target });
  const { managers, warnings, replacement_suspended: suspended } = cluster.info;
  // Between two leaders the row has none for a moment; the warning comes only if none is found.
  const leaderless = managers.leader === "" ? warnings.find((warning) => warning.includes("no leader since")) : undefined;
  if (leaderless) add("bad", "No leader", `${warningText(leaderless, now)}; containers keep running, changes wait`);
  if (managers.reachable < managers.total) {
    const spare = managers.reachable - (Math.floor(managers.total / 2) + 1);
    add(
      spare > 0 ? "warn" : "bad",
      `${managers.total - managers.reachable} of ${count(managers.total, "manager")} unreachable`,
      spare > 0
        ? `the cluster survives the loss of ${spare} more`
        : spare === 0 ? "if one more is lost, no change is possible"
        // After skep cluster recover, one manager leads without the others until they are demoted.
        : managers.leader ? `${cluster.get("nodes", managers.leader)?.name ?? "a manager"} leads without them: demote the lost managers` : "too few for a majority",
    );
  }
  if (suspended) add("bad", "Tasks of lost nodes are not replaced", suspended);
  for (const warning of warnings) if (warning !== leaderless) add("warn", warningText(warning, now), "");
  for (const node of cluster.all("nodes")) {
    if (node.state !== "ready") add("bad", node.state === "unknown" ? `The state of ${node.name} is unknown` : `${node.name} is ${node.state}`, lastHeard(node, now), ["nodes", node.id]);
    else if (node.reason) add("warn", `Node ${node.name}`, node.reason, ["nodes", node.id]);
  }
  for (const service of [...cluster.all("services")].filter(({ state, update }) => state !== "healthy" || isPaused(update)).sort(byUrgency)) {
    const level = service.state === "degraded" || isPaused(service.update) ? "bad" : "busy";
    add(level, `${service.name} ${progressInWords(service)}`, service.reason || service.update?.message || "", ["services", service.id]);
  }
  for (const volume of cluster.all("volumes")) {
    if (volume.reason) add("warn", `Volume ${volume.name}`, volume.reason, ["volumes", volume.id]);
  }
  return [...found.bad, ...found.warn, ...found.busy];
}

const isPaused = (update) => update?.state?.endsWith("paused") ?? false;

/** `2 problems, 1 warning` of what `problems()` found, without changes in progress. */
export function attentionInWords(found) {
  const number = (level) => found.filter((one) => one.level === level).length;
  return [[number("bad"), "problem"], [number("warn"), "warning"]].filter(([value]) => value > 0).map(([value, word]) => count(value, word)).join(", ");
}

/**
 * The verdict on the whole cluster, `{level, word, title, detail}` with `level` as of a badge, from what `problems()`
 * found.  A lost node comes before the services that it degrades, as it is their cause.
 */
export function headline(cluster, [first]) {
  if (first === undefined) {
    const services = cluster.size("services");
    const title = services === 0 ? "no services yet" : `${services === 1 ? "the service is" : `all ${count(services, "service")} are`} in the desired state`;
    return { level: "good", word: "Healthy", title, detail: "" };
  }
  const { level, title, detail } = first;
  if (level === "bad") return { level, word: "Degraded", title, detail };
  if (level === "warn") return { level, word: "Healthy", title: `but ${title[0].toLowerCase()}${title.slice(1)}`, detail };
  return { level: "warn", word: "Converging", title, detail };
}

/** Nodes, processors, memory and load of the whole cluster: `{nodes, cpus, memory, load, busiest}`; load null if unknown. */
export function capacity(cluster) {
  const nodes = cluster.all("nodes");
  const sum = (field) => nodes.reduce((total, node) => total + (node[field] || 0), 0);
  const loaded = nodes.filter(({ load, state }) => state === "ready" && Number.isFinite(load));
  const busiest = loaded.reduce((most, node) => (most === null || node.load > most.load ? node : most), null);
  const load = loaded.length > 0 ? loaded.reduce((total, node) => total + node.load, 0) / loaded.length : null;
  return { nodes: nodes.length, cpus: sum("cpus"), memory: sum("memory"), load, busiest };
}

/** The figures of the top bar. */
export function totals(cluster) {
  let running = 0;
  let desired = 0;
  for (const service of cluster.all("services")) {
    if (service.mode.endsWith("-job")) continue;
    const { done, of } = progress(service);
    running += done;
    desired += of;
  }
  const nodes = cluster.all("nodes");
  return { running, desired, ready: nodes.filter((node) => node.state === "ready").length, nodes: nodes.length };
}
