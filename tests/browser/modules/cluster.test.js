import assert from "node:assert/strict";
import { test } from "node:test";
import { attentionInWords, byUrgency, capacity, Cluster, headline, isCounted, lastHeard, phase, problems, replicasText, totals } from "../../../skep/dashboard/static/cluster.js";
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

test("a task that was replaced does not count, though its lost node cannot end it", () => {
  assert.ok(isCounted(task("t1")));
  assert.ok(isCounted(task("t1", { state: "ready", desired_state: "ready" })));
  assert.ok(isCounted(task("t1", { desired_state: "complete" })));
  assert.ok(!isCounted(task("t1", { state: "unknown", desired_state: "shutdown" })));
  assert.ok(!isCounted(task("t1", { desired_state: "remove" })));
  assert.ok(!isCounted(task("t1", { state: "failed" })));
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
  cluster.apply({ cursor: "1-2", set: { services: [service("s2", { name: "report", mode: "replicated-job" })] } });
  assert.equal(cluster.taskName(task("t", { service: "s2", slot: 0, node: "n2" })), "report.0");
});

for (const [expected, more] of [
  ["running", {}],
  ["unhealthy", { health: "unhealthy" }],
  ["stopping", { desired_state: "shutdown" }],
  ["pending", { state: "pending", node: "" }],
  ["starting", { state: "preparing" }],
  ["failed", { state: "failed" }],
  ["failed", { state: "rejected" }],
  ["completed", { state: "complete" }],
  ["unknown", { state: "unknown" }],
]) {
  test(`a task ${JSON.stringify(more)} is ${expected}`, () => assert.equal(phase(task("t", more)), expected));
}

test("jobs and one-shot services show what is done, others what runs", () => {
  const shown = (more) => replicasText(service("s", more));
  assert.equal(shown({ running: 1, desired: 3 }), "1/3");
  assert.equal(shown({ mode: "replicated-job", running: 0, desired: 0, completed: 6, total: 6 }), "6/6 completed");
  assert.equal(shown({ mode: "global-job", running: 1, desired: 1, completed: 5, total: 6 }), "5/6 completed");
  assert.equal(shown({ running: 0, desired: 1, completed: 1 }), "1/1 completed");
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

test("a node that is down shows its last heartbeat", () => {
  const now = Date.now();
  const down = node("n1", { state: "down", reason: "heartbeat failure", last_heartbeat_at: now / 1000 - 120 });
  assert.match(lastHeard(down, now), /^heartbeat failure, no heartbeat since .*\d\d:\d\d:\d\d \(2 min\)$/);
  assert.equal(lastHeard(node("n1", { last_heartbeat_at: 0 }), now), "");
});

const led = { total: 3, reachable: 3, leader: "n1" };
const theCluster = (more = {}) => ({ name: "c", managers: led, warnings: [], replacement_suspended: "", ...more });

test("problems come first, then warnings, then changes in progress", () => {
  const cluster = aCluster();
  cluster.apply({
    cursor: "1-2",
    set: {
      cluster: theCluster({ managers: { ...led, reachable: 2 }, warnings: ["WARNING: the store is almost full"] }),
      nodes: [node("n2", { state: "down", reason: "heartbeat failure" })],
      services: [service("s1", { state: "converging", running: 0 }), service("s2", { name: "api", state: "degraded", reason: "out of memory" })],
      volumes: [{ id: "v1", name: "orders", reason: "no plugin" }],
    },
  });
  const found = problems(cluster);
  assert.deepEqual(found.map(({ level, title }) => [level, title]), [
    ["bad", "1 of 3 managers unreachable"],
    ["bad", "n2 is down"],
    ["bad", "api 1/1 running"],
    ["warn", "the store is almost full"],
    ["warn", "Volume orders"],
    ["busy", "web 0/1 running"],
  ]);
  assert.equal(found[1].detail, "heartbeat failure");
  assert.match(found[0].detail, /if one more is lost, no change is possible/);
  assert.equal(attentionInWords(found), "3 problems, 2 warnings");
  assert.deepEqual(headline(cluster, found), { level: "bad", word: "Degraded", title: "1 of 3 managers unreachable", detail: "if one more is lost, no change is possible" });
});

test("a paused update needs attention even if every task runs", () => {
  const cluster = aCluster();
  cluster.apply({ cursor: "1-2", set: { services: [service("s1", { update: { state: "paused", message: "manually paused" } })] } });
  assert.deepEqual(problems(cluster).map(({ level, title, detail }) => [level, title, detail]), [["bad", "web 1/1 running", "manually paused"]]);
});

for (const [name, set, expected] of [
  ["healthy", {}, { level: "good", word: "Healthy", title: "the service is in the desired state", detail: "" }],
  ["healthy with two services", { services: [service("s2")] }, { level: "good", word: "Healthy", title: "all 2 services are in the desired state", detail: "" }],
  ["healthy with a warning", { cluster: theCluster({ warnings: ["WARNING: no backup"] }) }, { level: "warn", word: "Healthy", title: "but no backup", detail: "" }],
  ["converging", { services: [service("s1", { state: "converging", running: 0, reason: "starting" })] }, { level: "warn", word: "Converging", title: "web 0/1 running", detail: "starting" }],
  ["degraded", { services: [service("s1", { state: "degraded", running: 0, reason: "exit 1" })] }, { level: "bad", word: "Degraded", title: "web 0/1 running", detail: "exit 1" }],
]) {
  test(`the headline of a cluster that is ${name}`, () => {
    const cluster = aCluster();
    cluster.apply({ cursor: "1-2", set });
    assert.deepEqual(headline(cluster, problems(cluster)), expected);
  });
}

test("a cluster without a leader is degraded, whatever its services are", () => {
  const cluster = aCluster();
  const managers = { total: 3, reachable: 1, leader: "" };
  cluster.apply({ cursor: "1-2", set: { cluster: theCluster({ managers, warnings: ["WARNING: the managers have no leader since 2026-11-27T10:00:00.896841693Z"] }) } });
  const found = problems(cluster, Date.parse("2026-11-27T10:01:00Z"));
  assert.deepEqual(found.map(({ title }) => title), ["No leader", "2 of 3 managers unreachable"]);
  assert.match(found[0].detail, /^the managers have no leader since \d\d:00:00; containers keep running/);
  assert.equal(found[1].detail, "too few for a majority");
  assert.equal(headline(cluster, found).word, "Degraded");
  // After skep cluster recover, one of three leads.
  cluster.apply({ cursor: "1-3", set: { cluster: theCluster({ managers: { ...managers, leader: "gone" } }) } });
  assert.match(problems(cluster)[0].detail, /^a manager leads without them: demote/);
  // Between two leaders there is none for a moment, without a warning.
  cluster.apply({ cursor: "1-4", set: { cluster: theCluster({ managers: { ...led, leader: "" } }) } });
  assert.deepEqual(problems(cluster), []);
});

test("a cluster without services says so", () => {
  const cluster = new Cluster();
  cluster.take({ cursor: "1-1", nodes: [node("n1")] });
  assert.deepEqual(headline(cluster, problems(cluster)), { level: "good", word: "Healthy", title: "no services yet", detail: "" });
});

test("the capacity of a cluster leaves out the load of nodes that are down", () => {
  const cluster = new Cluster();
  assert.deepEqual(capacity(cluster), { nodes: 0, cpus: 0, memory: 0, load: null, busiest: null });
  cluster.take({ cursor: "1-1", nodes: [node("n1", { cpus: 2, memory: 4, load: 0.5 }), node("n2", { cpus: 4, memory: 8, load: 0.1 }), node("n3", { cpus: 8, memory: 16, load: 1, state: "down" })] });
  const { busiest, load, ...rest } = capacity(cluster);
  assert.deepEqual([rest, load.toFixed(2), busiest.id], [{ nodes: 3, cpus: 14, memory: 28 }, "0.30", "n1"]);
});

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
