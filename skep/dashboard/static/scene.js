/** The scene of the hive: the hexagon of each node, the cell of each task, and moves since the last scene.  No DOM here. */

import { cellPlace, cellRadius, comb, commonRings, rings, seat } from "./honeycomb.js";
import { phase } from "./cluster.js";
import { compareNames } from "./text.js";

const WAITING_SIZE = 9;
const WAITING_ROOM = 52;
const MARGIN = 14;
/** More moves than this at once are not animated, as nobody can follow them. */
const MOVES_MAX = 400;

/** Managers first, then by name, so that nodes keep their places while tasks change. */
export function orderedNodes(cluster) {
  return [...cluster.all("nodes")].sort(
    (a, b) => (a.role === "manager" ? 0 : 1) - (b.role === "manager" ? 0 : 1) || compareNames(a.name, b.name),
  );
}

/** Tasks by service and slot: the order in which an empty node is filled. */
function ordered(tasks, ranks) {
  return [...tasks].sort((a, b) => (ranks.get(a.service) ?? -1) - (ranks.get(b.service) ?? -1) || a.slot - b.slot);
}

/** The rank of each service by name.  Comparing the names of all tasks of a large cluster takes a tenth of a second. */
function ranksOf(cluster) {
  const services = [...cluster.all("services")].sort((a, b) => compareNames(a.name, b.name));
  return new Map(services.map(({ id }, i) => [id, i]));
}

const slotOf = (task) => (task.slot ? `${task.service} ${task.slot}` : task.id);

/** Builds scenes.  A task keeps its cell until it is removed. */
export class Scenes {
  #seats = new Map();
  #before = null;
  #order = { version: -1, rows: [] };
  #ranks = { version: -1, of: new Map() };
  #nodes = new Map();

  /**
   * Returns `{radius, nodes: [{row, x, y, size, ring, cells}], waiting: cells, cells: {task id: cell}, moves}`, a cell being
   * `{task, phase, x, y, size, node}` and a move `{cell, from: {x, y, size} | null}` or `{gone: cell}`.  A node in which
   * nothing has changed is the same object as in the scene before.
   */
  build(cluster, width, height) {
    const byNode = cluster.by("tasks", "node");
    if (this.#ranks.version !== cluster.versions.services || this.#ranks.cluster !== cluster) {
      this.#ranks = { cluster, version: cluster.versions.services, of: ranksOf(cluster) };
    }
    const ranks = this.#ranks.of;
    const waitingTasks = ordered(byNode.get("") ?? [], ranks);
    if (this.#order.version !== cluster.versions.nodes || this.#order.cluster !== cluster) {
      this.#order = { cluster, version: cluster.versions.nodes, rows: orderedNodes(cluster) };
    }
    const { rows } = this.#order;
    const room = height - (waitingTasks.length ? WAITING_ROOM : 0);
    const { radius, places } = comb(rows.length, width - 2 * MARGIN, room - 2 * MARGIN);
    const common = commonRings(rows.map((row) => byNode.get(row.id)?.length ?? 0));
    const cells = new Map();
    const nodes = rows.map((row, i) => {
      const place = { x: places[i].x + MARGIN, y: places[i].y + MARGIN };
      return this.#node(row, place, { radius, common, tasks: byNode.get(row.id) ?? [], ranks, cells });
    });
    for (const id of this.#seats.keys()) if (!cluster.get("nodes", id)) {
      this.#seats.delete(id);
      this.#nodes.delete(id);
    }
    const waiting = waitingTasks.map((task, i) => {
      const perRow = Math.max(1, Math.floor((width - 160) / (WAITING_SIZE * 2)));
      const x = 140 + (i % perRow) * WAITING_SIZE * 1.9;
      const y = height - WAITING_ROOM / 2 + Math.floor(i / perRow) * WAITING_SIZE * 1.8;
      const cell = { task, phase: phase(task), x, y, size: WAITING_SIZE, node: "" };
      cells.set(task.id, cell);
      return cell;
    });
    const scene = { width, height, radius, nodes, waiting, cells, moves: [] };
    scene.moves = moves(this.#before, scene);
    this.#before = scene;
    return scene;
  }

  #node(row, { x, y }, { radius, common, tasks, ranks, cells }) {
    const old = this.#nodes.get(row.id);
    const isSame = old?.row === row && old.x === x && old.y === y && old.radius === radius && old.common === common;
    if (isSame && old.cells.length === tasks.length && tasks.every((task, i) => task === old.cells[i].task)) {
      for (const cell of old.cells) cells.set(cell.task.id, cell);
      return old;
    }
    const known = this.#seats.get(row.id);
    const hasAll = known?.size === tasks.length && tasks.every((task) => known.has(task.id));
    const seats = hasAll ? known : seat(known ?? new Map(), ordered(tasks, ranks).map((task) => task.id));
    this.#seats.set(row.id, seats);
    const highest = Math.max(-1, ...seats.values());
    const ring = Math.max(common, rings(highest + 1));
    const size = cellRadius(radius, ring);
    const own = tasks.map((task) => {
      const at = cellPlace(seats.get(task.id), size);
      const cell = { task, phase: phase(task), x: x + at.x, y: y + at.y, size, node: row.id };
      cells.set(task.id, cell);
      return cell;
    });
    const node = { row, x, y, radius, common, ring, size, cells: own, seats };
    this.#nodes.set(row.id, node);
    return node;
  }
}

/** The moves between two scenes, or none if the nodes have other places. */
export function moves(before, after) {
  if (before === null || before.radius !== after.radius || before.width !== after.width) return [];
  const found = [];
  const slots = new Map();
  const same = new Set(before.nodes);
  const changed = (scene, other) => [...scene.waiting, ...scene.nodes.filter((node) => !other.has(node)).flatMap((node) => node.cells)];
  for (const cell of changed(before, new Set(after.nodes))) if (!after.cells.has(cell.task.id)) slots.set(slotOf(cell.task), cell);
  for (const cell of changed(after, same)) {
    const { id } = cell.task;
    const old = before.cells.get(id) ?? slots.get(slotOf(cell.task));
    if (old === undefined) found.push({ cell, from: null });
    else if (old.node !== cell.node) found.push({ cell, from: old });
    if (old !== undefined && old.task.id !== id) slots.delete(slotOf(cell.task));
  }
  for (const gone of slots.values()) found.push({ gone });
  return found.length > MOVES_MAX ? [] : found;
}

/** The node and the cell at a point.  Either may be null. */
export function at(scene, x, y) {
  for (const cell of scene.waiting) if (Math.hypot(cell.x - x, cell.y - y) <= cell.size) return { node: null, cell };
  for (const node of scene.nodes) {
    if (Math.abs(x - node.x) > node.radius || Math.abs(y - node.y) > node.radius * 0.87) continue;
    if (1.7320508 * Math.abs(x - node.x) + Math.abs(y - node.y) > 1.7320508 * node.radius) continue;
    let nearest = null;
    let distance = node.size;
    for (const cell of node.cells) {
      const d = Math.hypot(cell.x - x, cell.y - y);
      if (d <= distance) [nearest, distance] = [cell, d];
    }
    return { node, cell: nearest };
  }
  return { node: null, cell: null };
}
