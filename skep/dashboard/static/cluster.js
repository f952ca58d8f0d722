/** The cluster as the last snapshot and the changes since then say.  No DOM here. */

import { clockTime } from "./text.js";

export const KINDS = ["nodes", "services", "tasks", "networks", "stacks", "volumes", "secrets", "configs"];

const ENDED = new Set(["complete", "shutdown", "failed", "rejected", "remove", "orphaned"]);
const WRONG = new Set(["failed", "rejected", "orphaned"]);

export const isEnded = (task) => ENDED.has(task.state);
export const isWrong = (task) => WRONG.has(task.state);

/** How a task is drawn and named: `waiting`, `starting`, `running`, `unhealthy`, `stopping`, `done`, `failed` or `unknown`. */
export function phase(task) {
  if (task.state === "unknown") return "unknown";
  if (isWrong(task)) return "failed";
  if (ENDED.has(task.state)) return "done";
  if (task.state === "running") {
    if (task.desired_state !== "running" && task.desired_state !== "complete") return "stopping";
    return task.health === "unhealthy" ? "unhealthy" : "running";
  }
  return task.node ? "starting" : "waiting";
}

/** What is known of a cluster, by kind and id, with the indexes that pages ask for. */
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

  /** The name of a row, or the beginning of the id of one that is gone. */
  name(kind, id) {
    return this.#rows[kind].get(id)?.name ?? (id ? id.slice(0, 12) : "–");
  }

  /** `web.2` of a task, `web.HOST` where there is one on each node. */
  taskName(task) {
    const service = this.#rows.services.get(task.service);
    const name = service?.name ?? (task.service ? task.service.slice(0, 12) : "container");
    if (task.slot) return `${name}.${task.slot}`;
    return task.node ? `${name}.${this.name("nodes", task.node)}` : name;
  }

  #index(name, kind, make) {
    const known = this.#indexes.get(name);
    if (known?.version === this.versions[kind]) return known.value;
    const value = make(this.#rows[kind]);
    this.#indexes.set(name, { version: this.versions[kind], value });
    return value;
  }
}

/** How many tasks are as they should be, `{done, of, isJob}`: of a job, or of a service whose tasks end, those that completed. */
export function progress({ mode, running, desired, completed = 0, total = 0 }) {
  if (mode.endsWith("-job")) return { done: completed, of: total || desired, isJob: true };
  if (completed > 0 && running === 0) return { done: completed, of: desired, isJob: true };
  return { done: running, of: desired, isJob: false };
}

/** `2/3`, or `6/6 done`. */
export function replicasText(service) {
  const { done, of, isJob } = progress(service);
  return `${done}/${of}${isJob ? " done" : ""}`;
}

const URGENCY = { degraded: 0, converging: 1, healthy: 2 };

/** Services that need someone first, those that have for longest before others, then by name. */
export function byUrgency(a, b) {
  return URGENCY[a.state] - URGENCY[b.state] || (a.state === "healthy" ? 0 : (a.since || Infinity) - (b.since || Infinity) || 0) || (a.name < b.name ? -1 : 1);
}

/** Why a node is not well, and when it was last heard. */
export function lastHeard(node, now) {
  return [node.reason, node.last_heartbeat_at && `last heard ${clockTime(node.last_heartbeat_at, now)}`].filter(Boolean).join("; ");
}

/**
 * What an operator should look at, worst first: `{level: "bad"|"warn", title, detail, target}`, the target
 * being `[kind, id]` or null.
 */
export function problems(cluster) {
  const found = [];
  const add = (level, title, detail, target = null) => found.push({ level, title, detail, target });
  const { managers, warnings, replacement_suspended: suspended } = cluster.info;
  if (managers.reachable < managers.total) {
    const quorum = Math.floor(managers.total / 2) + 1;
    const spare = managers.reachable - quorum;
    add(
      spare > 0 ? "warn" : "bad",
      `${managers.total - managers.reachable} of ${managers.total} managers unreachable`,
      spare > 0 ? `the cluster survives the loss of ${spare} more` : "the loss of one more stops every change",
    );
  }
  if (suspended) add("bad", "Lost nodes' tasks are not replaced", suspended);
  for (const warning of warnings) add("warn", warning, "");
  for (const node of cluster.all("nodes")) {
    if (node.state !== "ready") add("bad", `${node.name} is ${node.state}`, lastHeard(node, Date.now()), ["nodes", node.id]);
    else if (node.reason) add("warn", node.name, node.reason, ["nodes", node.id]);
  }
  for (const service of [...cluster.all("services")].sort(byUrgency)) {
    const target = ["services", service.id];
    const paused = service.update?.state?.endsWith("paused");
    if (service.state === "degraded" || paused) {
      add("bad", `${service.name} ${replicasText(service)}`, service.reason || service.update?.message || "", target);
    } else if (service.state === "converging") {
      add("warn", `${service.name} ${replicasText(service)}`, service.reason || service.update?.message || "", target);
    }
  }
  for (const volume of cluster.all("volumes")) {
    if (volume.reason) add("warn", `volume ${volume.name}`, volume.reason, ["volumes", volume.id]);
  }
  return found.sort((a, b) => (a.level === b.level ? 0 : a.level === "bad" ? -1 : 1));
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
