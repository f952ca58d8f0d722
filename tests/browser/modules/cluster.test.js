import assert from "node:assert/strict";
import { test } from "node:test";
import { byUrgency, Cluster, lastHeard, phase, problems, replicasText, totals } from "../../../skep/dashboard/static/cluster.js";
import { search } from "../../../skep/dashboard/static/search.js";

const node = (id, more = {}) => ({ id, name: id, role: "worker", manager: "", leader: false, state: "ready", availability: "active", address: "10.0.0.1", engine: "", labels: {}, load: null, reason: "", ...more });
const task = (id, more = {}) => ({ id, service: "s1", slot: 1, node: "n1", state: "running", desired_state: "running", error: "", message: "", health: "", image: "nginx", current: true, ...more });
const service = (id, more = {}) => ({ id, name: "web", mode: "replicated", desired: 1, running: 1, completed: 0, state: "healthy", reason: "", image: "nginx:1", stack: "", ports: [], update: null, ...more });

function aCluster() {
  const cluster = new Cluster();
  cluster.take({ cursor: "1-1", nodes: [node("n1"), node("n2")], services: [service("s1")], tasks: [task("t1"), task("t2", { slot: 2, node: "n2" })] });
  return cluster;
}

test("a change replaces whole rows and removes those that are gone, and may come twice", () => {
  const cluster = aCluster();
  const change = { cursor: "1-2", set: { tasks: [task("t3", { slot: 2 })] }, removed: { tasks: ["t2"] } };
  cluster.apply(change);
  cluster.apply(change);
  assert.deepEqual(cluster.all("tasks").map(({ id }) => id), ["t1", "t3"]);
  assert.deepEqual(cluster.tasksOf("node", "n1").map(({ id }) => id), ["t1", "t3"]);
  assert.deepEqual(cluster.tasksOf("node", "n2"), []);
  assert.equal(cluster.cursor, "1-2");
});

test("kinds that this page does not know are ignored", () => {
  const cluster = aCluster();
  cluster.apply({ cursor: "1-2", set: { galaxies: [{ id: "g" }] }, removed: { galaxies: ["h"], __proto__: ["x"] } });
  assert.equal(cluster.size("tasks"), 2);
});

test("an index is made again only when its kind has changed", () => {
  const cluster = aCluster();
  const tasks = cluster.all("tasks");
  cluster.apply({ cursor: "1-2", set: { nodes: [node("n3")] } });
  assert.equal(cluster.all("tasks"), tasks);
  cluster.apply({ cursor: "1-3", set: { tasks: [task("t9")] } });
  assert.notEqual(cluster.all("tasks"), tasks);
});

test("tasks are called as in Docker", () => {
  const cluster = aCluster();
  assert.equal(cluster.taskName(task("t", { slot: 3 })), "web.3");
  assert.equal(cluster.taskName(task("t", { slot: 0, node: "n2" })), "web.n2");
  assert.equal(cluster.taskName(task("t", { service: "0123456789abcdef" })), "0123456789ab.1");
});

for (const [expected, more] of [
  ["running", {}],
  ["unhealthy", { health: "unhealthy" }],
  ["stopping", { desired_state: "shutdown" }],
  ["waiting", { state: "pending", node: "" }],
  ["starting", { state: "preparing" }],
  ["failed", { state: "failed" }],
  ["failed", { state: "rejected" }],
  ["done", { state: "complete" }],
  ["unknown", { state: "unknown" }],
]) {
  test(`a task ${JSON.stringify(more)} is ${expected}`, () => assert.equal(phase(task("t", more)), expected));
}

test("jobs and one-shot services show what is done, others what runs", () => {
  const shown = (more) => replicasText(service("s", more));
  assert.equal(shown({ running: 1, desired: 3 }), "1/3");
  assert.equal(shown({ mode: "replicated-job", running: 0, desired: 0, completed: 6, total: 6 }), "6/6 done");
  assert.equal(shown({ mode: "global-job", running: 1, desired: 1, completed: 5, total: 6 }), "5/6 done");
  assert.equal(shown({ running: 0, desired: 1, completed: 1 }), "1/1 done");
  const cluster = new Cluster();
  cluster.take({ cursor: "1-1", services: [service("s1", { running: 1, desired: 2 }), service("s2", { running: 0, completed: 1 })] });
  assert.deepEqual([totals(cluster).running, totals(cluster).desired], [2, 3]);
});

test("services that need someone come first, the oldest problem before others", () => {
  const rows = [
    service("a", { name: "a" }),
    service("b", { name: "b", state: "converging", since: 10 }),
    service("c", { name: "c", state: "degraded", since: 200 }),
    service("d", { name: "d", state: "degraded", since: 100 }),
    service("e", { name: "e", state: "degraded" }),
  ];
  assert.deepEqual([...rows].sort(byUrgency).map(({ id }) => id), ["d", "c", "e", "b", "a"]);
});

test("a node that is down says when it was last heard", () => {
  const now = Date.now();
  const down = node("n1", { state: "down", reason: "heartbeat failure", last_heartbeat_at: now / 1000 });
  assert.match(lastHeard(down, now), /^heartbeat failure; last heard \d\d:\d\d:\d\d$/);
  assert.equal(lastHeard(node("n1", { last_heartbeat_at: 0 }), now), "");
});

test("what is wrong is listed, the worst first", () => {
  const cluster = aCluster();
  cluster.apply({
    cursor: "1-2",
    set: {
      cluster: { name: "c", managers: { total: 3, reachable: 2, leader: "n1" }, warnings: ["the store is almost full"], replacement_suspended: "" },
      nodes: [node("n2", { state: "down", reason: "heartbeat failure" })],
      services: [service("s1", { state: "converging", running: 0 }), service("s2", { name: "api", state: "degraded", reason: "out of memory" })],
    },
  });
  const found = problems(cluster);
  assert.deepEqual(found.map(({ level }) => level), ["bad", "bad", "bad", "warn", "warn"]);
  assert.ok(found.some(({ title, detail }) => title === "n2 is down" && detail === "heartbeat failure"));
  assert.match(found[0].detail, /loss of one more stops every change/);
});

test("a cluster that is well has nothing to look at", () => assert.deepEqual(problems(aCluster()), []));

test("search finds by name, id, image, address, label, error and port, names first", () => {
  const cluster = aCluster();
  cluster.apply({ cursor: "1-2", set: { nodes: [node("n3", { name: "web-host", labels: { zone: "north" } })], services: [service("s2", { name: "api", image: "shop/api:2.1", ports: [{ published: 8080, target: 80, protocol: "tcp" }] })], tasks: [task("t7", { service: "s2", error: "out of memory" })] } });
  const found = (query) => search(cluster, query).map(({ kind, id }) => `${kind} ${id}`);
  assert.equal(found("web")[0], "services s1");
  assert.ok(found("web").includes("nodes n3"));
  assert.deepEqual(found("zone=north"), ["nodes n3"]);
  assert.deepEqual(found("8080"), ["services s2"]);
  assert.deepEqual(found("memory"), ["tasks t7"]);
  assert.equal(search(cluster, "memory")[0].because, "out of memory");
  assert.deepEqual(found("api 2.1"), ["services s2"]);
  assert.deepEqual(found("t7"), ["tasks t7"]);
  assert.deepEqual(found("nothing-has-this"), []);
  assert.deepEqual(found("  "), []);
});
