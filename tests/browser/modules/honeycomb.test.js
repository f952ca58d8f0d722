import assert from "node:assert/strict";
import { test } from "node:test";
import { Cluster } from "../../../skep/dashboard/static/cluster.js";
import { cell, cellPlace, cellRadius, cellsOf, comb, isInside, rings, seat } from "../../../skep/dashboard/static/honeycomb.js";
import { Scenes, at } from "../../../skep/dashboard/static/scene.js";

const near = (a, b) => Math.hypot(a.x - b.x, a.y - b.y);

for (const [count, width, height] of [[1, 800, 600], [5, 1000, 600], [7, 390, 500], [60, 1280, 700], [500, 1400, 900]]) {
  test(`${count} nodes in ${width} by ${height} are within the room and do not overlap`, () => {
    const { radius, places } = comb(count, width, height);
    assert.equal(places.length, count);
    const half = (radius * Math.sqrt(3)) / 2;
    for (const { x, y } of places) {
      assert.ok(x - radius > -0.01 && x + radius < width + 0.01, `${x}`);
      assert.ok(y - half > -0.01 && y + half < height + 0.01, `${y}`);
    }
    for (let i = 0; i < count; i += 1) {
      for (let j = i + 1; j < Math.min(count, i + 60); j += 1) assert.ok(near(places[i], places[j]) > 2 * half - 0.01);
    }
  });
}

test("no nodes and no room make no comb", () => {
  assert.deepEqual(comb(0, 100, 100).places, []);
  assert.deepEqual(comb(3, 0, 100).places, []);
});

test("cells of a spiral are all different, ring by ring", () => {
  const cells = Array.from({ length: cellsOf(6) }, (_, i) => cell(i));
  assert.equal(new Set(cells.map(({ q, r }) => `${q} ${r}`)).size, cells.length);
  cells.forEach(({ q, r }, i) => assert.equal(Math.max(Math.abs(q), Math.abs(r), Math.abs(q + r)), rings(i + 1)));
});

test("cells are within their node and do not overlap", () => {
  for (const ring of [1, 3, 5]) {
    const size = cellRadius(100, ring);
    const places = Array.from({ length: cellsOf(ring) }, (_, i) => cellPlace(i, size));
    for (const { x, y } of places) assert.ok(isInside(x, y, 100));
    for (const a of places) for (const b of places) assert.ok(a === b || near(a, b) > size * Math.sqrt(3) - 0.01);
  }
});

test("a task keeps its cell while others come and go", () => {
  const first = seat(new Map(), ["a", "b", "c"]);
  const second = seat(first, ["a", "c", "d"]);
  assert.deepEqual([second.get("a"), second.get("c"), second.get("d")], [first.get("a"), first.get("c"), first.get("b")]);
});

test("a comb that has lost most tasks is filled from the middle again", () => {
  const many = Array.from({ length: 60 }, (_, i) => `t${i}`);
  assert.deepEqual([...seat(seat(new Map(), many), ["t58", "t59"]).values()], [0, 1]);
});

function clusterOf(nodes, tasks) {
  const cluster = new Cluster();
  cluster.take({
    cursor: "1-1",
    nodes: nodes.map((id) => ({ id, name: id, role: "worker", state: "ready", availability: "active", leader: false, load: null })),
    services: [{ id: "s1", name: "web" }],
    tasks: tasks.map(([id, slot, node]) => ({ id, slot, node, service: "s1", state: node ? "running" : "pending", desired_state: "running", health: "", current: true })),
  });
  return cluster;
}

test("a replacement flies from its slot's last cell, a pending task from the strip, others appear and go", () => {
  const scenes = new Scenes();
  const cluster = clusterOf(["n1", "n2"], [["t1", 1, "n1"], ["t2", 2, "n1"], ["t3", 3, ""], ["t4", 4, "n2"]]);
  const before = scenes.build(cluster, 800, 600);
  assert.deepEqual(before.moves, []);
  assert.equal(before.waiting.length, 1);
  const row = (id, slot, node) => ({ ...cluster.get("tasks", "t1"), id, slot, node });
  cluster.apply({ cursor: "1-2", removed: { tasks: ["t1", "t4"] }, set: { tasks: [row("t9", 1, "n2"), { ...cluster.get("tasks", "t3"), state: "pending" }, row("t5", 5, "n1")] } });
  const { moves } = scenes.build(cluster, 800, 600);
  const flight = moves.find(({ cell: one }) => one?.task.id === "t9");
  assert.equal(flight.from.task.id, "t1");
  assert.equal(moves.find(({ cell: one }) => one?.task.id === "t5").from, null);
  assert.deepEqual(moves.filter(({ gone }) => gone).map(({ gone }) => gone.task.id), ["t4"]);
});

test("what is at a point is found", () => {
  const scene = new Scenes().build(clusterOf(["n1", "n2"], [["t1", 1, "n1"]]), 800, 600);
  const seen = scene.cells.get("t1");
  assert.equal(at(scene, seen.x, seen.y).cell.task.id, "t1");
  assert.equal(at(scene, seen.x, seen.y).node.row.id, "n1");
  assert.deepEqual(at(scene, 1, 1), { node: null, cell: null });
});
