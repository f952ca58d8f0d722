import assert from "node:assert/strict";
import { test } from "node:test";

import { Cluster } from "../../../skep/dashboard/static/cluster.js";
import { followLog } from "../../../skep/dashboard/static/log_frames.js";
import { Journal } from "../../../skep/dashboard/static/journal.js";
import { Resources } from "../../../skep/dashboard/static/resources.js";
import { portText, portsText } from "../../../skep/dashboard/static/ports.js";
import { Diagnostics, JsonLines, diagnosed, failing } from "../../../skep/dashboard/static/reach.js";
import { families, uptake } from "../../../skep/dashboard/static/versions.js";

const port = (published, mode = "ingress", protocol = "tcp") => ({ published, target: 80, protocol, mode });

test("a port of nodes has the numbers that they gave it", () => {
  assert.equal(portText(port(8080)), "8080→80");
  assert.equal(portText(port(53, "ingress", "udp")), "53→80/udp");
  assert.equal(portText(port(8080, "host")), "8080→80 (host)");
  const tasks = [{ ports: [port(32769, "host")] }, {}, { ports: [port(32768, "host"), port(1, "host", "udp")] }];
  assert.equal(portsText([port(8080), port(0, "host")], tasks), "8080→80 32768, 32769→80 (host)");
  assert.equal(portsText([port(0, "host")], []), "→80 (host)");
  const many = Array.from({ length: 9 }, (_, i) => ({ ports: [port(32768 + i, "host")] }));
  assert.equal(portsText([port(0, "host")], many), "32768–32776→80 (host)");
});

test("the state of diagnostics follows from their lines", () => {
  const finding = { Check: "overlay", Port: "4789/udp", Sent: 4, Lost: 0, Failing: false, RoundTripMs: 1.5, Detail: "" };
  const lines = [
    { Nodes: [{ ID: "a" }, { ID: "b" }, { ID: "c" }] },
    { ID: "a", Hostname: "m1", Paths: [{ PeerID: "b", Peer: "w1", Findings: [finding] }] },
    { ID: "b", Hostname: "w1", Paths: [{ PeerID: "a", Peer: "m1", Findings: [{ ...finding, Lost: 4, Failing: true, Detail: "no answer" }] }], Conditions: ["no room"] },
    { ID: "c", Hostname: "", Error: "it is down" },
  ];
  const found = diagnosed(lines);
  assert.deepEqual([found.asked, found.done, found.pairs], [3, 3, 2]);
  assert.deepEqual(found.wrong, [{ from: "w1", to: "m1", check: "overlay", port: "4789/udp", lost: 4, sent: 4, detail: "no answer" }]);
  assert.deepEqual(found.errors, [{ name: "c", error: "it is down" }]);
  assert.deepEqual(found.slowest, { ms: 1.5, from: "m1", to: "w1" });
  assert.deepEqual(diagnosed([]).wrong, []);
  assert.deepEqual(failing([{ id: "a", failing_checks: [{ peer: "w1", check: "overlay", port: "4789/udp" }] }]).map(({ to }) => to), ["w1"]);
});

test("lines come in pieces, one is not endless, and diagnostics run one at a time", async () => {
  const json = new JsonLines();
  const bytes = new TextEncoder().encode('{"a":"é"}\n\n{"b":1}\n');
  for (const byte of bytes) json.take(Uint8Array.of(byte));
  assert.deepEqual(json.lines, [{ a: "é" }, { b: 1 }]);
  assert.throws(() => json.take(new Uint8Array(2 << 20).fill(32)), /too long/);
  let asked = 0;
  let end;
  const stream = (path, _signal, take) => {
    asked += 1;
    assert.equal(path, "skep/doctor/network");
    take(new TextEncoder().encode('{"Nodes":[]}\n'));
    return new Promise((_, reject) => { end = reject; });
  };
  const diagnostics = new Diagnostics(stream, () => {});
  const running = diagnostics.run();
  await diagnostics.run();
  assert.equal(asked, 1);
  end(new Error("gone"));
  await running;
  assert.deepEqual([diagnostics.isRunning, diagnostics.error, diagnostics.lines.length], [false, "gone", 1]);
});

test("versions of a secret are together, and tasks of the present spec have theirs", () => {
  const row = (name, created_at, of) => ({ id: name, name, created_at, labels: of ? { "skep.rotation.of": of } : {}, services: ["s"] });
  const rows = [row("key", 1), row("key-2", 2, "key"), row("other", 3), row("key-3", 9, "key")];
  assert.deepEqual(families(rows).get("key").map(({ name }) => name), ["key-3", "key-2", "key"]);
  assert.equal(families(rows).get("other").length, 1);
  const cluster = new Cluster();
  const task = (id, current, state = "running") => ({ id, service: "s", node: "n", state, desired_state: "running", current });
  cluster.take({ cursor: "1-1", tasks: [task("a", true), task("b", false), task("c", true, "starting")] });
  assert.deepEqual(uptake(cluster, rows[3]), { have: 1, wait: 1 });
});

const logLine = (task, second, text) => `2026-11-30T12:00:${String(second).padStart(2, "0")}.000000000Z com.docker.swarm.task.id=${task} ${text}\n`;

test("a log is followed again after a lost connection, and shows each line once", async () => {
  const answers = [
    { lines: [logLine("a", 10, "one"), logLine("b", 5, "two")], error: new TypeError("network error") },
    { lines: [], error: Object.assign(new Error("no leader"), { status: 503 }) },
    // The clock of b is behind: its new line is older than the last one of a.
    { lines: [logLine("b", 5, "two"), logLine("b", 7, "three"), logLine("a", 10, "one"), logLine("a", 11, "four")] },
  ];
  const [asked, taken, said] = [[], [], []];
  const stream = async (path, _signal, take) => {
    asked.push(path.replace(/.*details=1&/, ""));
    const { lines, error } = answers.shift();
    if (lines.length > 0) take(new TextEncoder().encode(lines.join("")), "application/vnd.docker.raw-stream");
    if (error) throw error;
  };
  const take = (lines) => taken.push(...lines.map(({ text }) => text.split(" ").at(-1)));
  const isOver = () => answers.length === 0;
  await followLog(stream, "services/x", new AbortController().signal, { take, say: (text) => said.push(text), isOver, pause: async () => {} });
  assert.deepEqual(taken, ["one", "two", "three", "four"]);
  const since = Date.parse("2026-11-30T12:00:05Z") / 1000;
  assert.deepEqual(asked, ["tail=200", `tail=all&since=${since}`, `tail=all&since=${since}`]);
  assert.deepEqual(said.filter((text) => text.includes(".")), ["No output yet. Following…", "No connection. Reconnecting…", "no leader. Reconnecting…", "The log has ended."]);
});

test("a log that is refused, or that nobody looks at, is not requested again", async () => {
  const said = [];
  const options = { take: () => {}, say: (text) => said.push(text), isOver: () => false, pause: async () => {} };
  await followLog(async () => { throw Object.assign(new Error("no such service"), { status: 404 }); }, "services/x", new AbortController().signal, options);
  assert.equal(said.at(-1), "no such service");
  const closed = new AbortController();
  await followLog(async () => { closed.abort(); throw new TypeError("aborted"); }, "services/x", closed.signal, options);
  assert.equal(said.at(-1), "No output yet. Following…");
});

test("what could not be read while the connection was lost is read again, although the cluster stays the same", async () => {
  let isLost = true;
  const ask = async () => {
    if (isLost) throw new Error("no connection");
    return { Entries: [], OldestState: null };
  };
  const journal = new Journal(ask, () => {});
  await journal.refresh(7, 10_000);
  assert.equal(journal.error, "no connection");
  let time = 10_000;
  const resources = new Resources(() => {}, ask, () => time);
  const settled = () => new Promise((resolve) => setImmediate(resolve));
  resources.use("x", 7);
  await settled();
  assert.equal(resources.use("x", 7).error, "no connection");
  isLost = false;
  await journal.refresh(7, 12_000);
  assert.deepEqual([journal.error, journal.isRead], ["", true]);
  resources.use("x", 7);
  await settled();
  assert.equal(resources.use("x", 7).error, "no connection", "not at once, because each answer draws the page");
  time = 15_000;
  resources.use("x", 7);
  await settled();
  assert.equal(resources.use("x", 7).error, undefined);
});
