import assert from "node:assert/strict";
import { test } from "node:test";
import { age, bytes, clean, count, duration, imageName, latency, rate, short } from "../../../skep/dashboard/static/text.js";
import { Frames, parsedLine } from "../../../skep/dashboard/static/log_frames.js";
import { course, difference, missingRole, quorumAfter, requireSame, scaled, whenDrained } from "../../../skep/dashboard/static/plans.js";
import { Journal, fromEvent, fromHistory, histogram } from "../../../skep/dashboard/static/journal.js";

for (const [given, expected] of [
  ["plain ✓ ünï 蜂", "plain ✓ ünï 蜂"],
  ["a\u202egpj.exe", "a\ufffdgpj.exe"],
  ["zero\u200bwidth\u2066", "zero\ufffdwidth\ufffd"],
  ["bell\u0007\u001b[31m", "bell\ufffd\ufffd[31m"],
  ["tab\tand\nline", "tab\tand\nline"],
  ["half \ud83d end", "half \ufffd end"],
  ["bee 🐝", "bee 🐝"],
  [undefined, ""],
  [12, "12"],
]) {
  test(`clean ${JSON.stringify(given)}`, () => assert.equal(clean(given), expected));
}

test("marks are not heaped up", () => assert.ok(clean(`a${"\u0301".repeat(500)}`).length < 12));
test("endless text is cut", () => assert.ok(clean("x".repeat(1e6)).length < 30_000));
test("short keeps one line", () => assert.equal(short("one\ntwo three", 8), "one two…"));
test("numbers have units", () => {
  assert.deepEqual([0, 59, 60, 7200, 200_000].map(duration), ["0 s", "59 s", "1 min", "2 h", "2 d"]);
  assert.deepEqual([500, 1536, 34_359_738_368].map(bytes), ["500 B", "1.5 KiB", "32 GiB"]);
  assert.equal(count(10_000, "task"), "10\u202f000 tasks");
  assert.equal(age(100, 160_000), "1 min");
  assert.equal(age(0, 160_000), "–");
});
test("images are shown without what everybody knows", () => {
  assert.equal(imageName("docker.io/library/nginx:1.27@sha256:0123abc"), "nginx:1.27");
  assert.equal(imageName("registry.example/a/b:1"), "registry.example/a/b:1");
});

const frame = (stream, text) => {
  const content = new TextEncoder().encode(text);
  const head = new Uint8Array([stream, 0, 0, 0, 0, 0, 0, 0]);
  new DataView(head.buffer).setUint32(4, content.length);
  return [...head, ...content];
};

test("frames are put together wherever they were cut", () => {
  const bytes = new Uint8Array([...frame(1, "größe\n"), ...frame(2, "broken\n"), ...frame(1, "")]);
  for (let size = 1; size < bytes.length; size += 1) {
    const frames = new Frames(true);
    const found = [];
    for (let i = 0; i < bytes.length; i += size) found.push(...frames.take(bytes.slice(i, i + size)));
    assert.deepEqual(found, [{ stream: "stdout", text: "größe" }, { stream: "stderr", text: "broken" }, { stream: "stdout", text: "" }]);
  }
});
test("a frame without end is refused", () => {
  assert.throws(() => new Frames(true).take(new Uint8Array([1, 0, 0, 0, 255, 255, 255, 255])), /a frame of/);
});
test("lines of a terminal come without frames", () => {
  const frames = new Frames(false);
  const bytes = (text) => new TextEncoder().encode(text);
  assert.deepEqual(frames.take(bytes("one\r\ntw")), [{ stream: "stdout", text: "one" }]);
  assert.deepEqual(frames.take(bytes("o\n")), [{ stream: "stdout", text: "two" }]);
});
test("details and stamps are taken off a line, escapes out of it", () => {
  const details = "com.docker.swarm.node.id=n1,com.docker.swarm.service.id=s1,com.docker.swarm.task.id=t1";
  const stamp = "2026-01-02T03:04:05.000000006Z";
  for (const more of ["skep-kept=head", "env=a%20b,tier=1"]) {
    assert.deepEqual(parsedLine(`${stamp} ${details},${more} a, b=c`), { at: stamp, task: "t1", text: "a, b=c" });
  }
  for (const line of [`${stamp} ${details} \u001b[31mhello`, `${details} ${stamp} \u001b[31mhello`]) {
    assert.deepEqual(parsedLine(line), { at: stamp, task: "t1", text: "hello" });
  }
  assert.deepEqual(parsedLine("com.docker.swarm.evil <img>"), { at: "", task: "", text: "com.docker.swarm.evil <img>" });
});

test("a placement is compared with the tasks there are", () => {
  const placement = { Nodes: [{ NodeID: "n1", Hostname: "w1", Tasks: 3 }, { NodeID: "n2", Hostname: "w2", Tasks: 1 }] };
  assert.deepEqual(difference(placement, new Map([["n1", 1], ["n3", 1], ["", 4]])), [
    { node: "n1", hostname: "w1", before: 1, after: 3 },
    { node: "n2", hostname: "w2", before: 0, after: 1 },
    { node: "n3", hostname: "", before: 1, after: 0 },
  ]);
});
test("a changed spec keeps everything else", () => {
  const spec = { Name: "web", Mode: { Replicated: { Replicas: 1 } }, Labels: { a: "b" } };
  assert.deepEqual(scaled(spec, 4), { Name: "web", Mode: { Replicated: { Replicas: 4 } }, Labels: { a: "b" } });
  assert.equal(spec.Mode.Replicated.Replicas, 1);
});
test("the course of an update is said in words", () => {
  assert.match(course({ UpdateConfig: { Parallelism: 2, Order: "start-first", FailureAction: "rollback" } }, 6), /^6 tasks are replaced 2 at a time, and a new task starts before the old one stops. A failure rolls it back.$/);
  assert.match(course({}, 1), /^1 task is replaced one after the other, and the old task stops before the new one starts. A failure pauses the update.$/);
});
test("a drain moves tasks of replicated services and ends those of global ones", () => {
  const groups = [{ service: { name: "web", mode: "replicated" }, count: 3 }, { service: { name: "agent", mode: "global" }, count: 1 }];
  assert.deepEqual(whenDrained(groups), { move: ["web ×3"], end: ["agent"] });
});
test("actions name the role that a user lacks", () => {
  const of = (...roles) => ({ by_login: true, roles });
  const operator = { role: "operator", stack: "shop" };
  assert.equal(missingRole({ by_login: false, roles: [] }, operator), "");
  assert.equal(missingRole(of("viewer"), operator), "You need the role operator to change this. You are viewer.");
  assert.equal(missingRole(of("viewer", "operator:shop"), operator), "");
  assert.notEqual(missingRole(of("viewer", "operator:shop"), { role: "operator", stack: "" }), "");
  assert.notEqual(missingRole(of("viewer", "operator:shop"), { role: "operator", stack: "blog" }), "");
  assert.equal(missingRole(of("admin"), operator), "");
  assert.notEqual(missingRole(of("operator"), { role: "admin" }), "");
});
test("the quorum after a change of role is shown before it", () => {
  assert.deepEqual(quorumAfter({ total: 3, reachable: 3 }, 1, true), { managers: 4, survives: 1, warning: "4 managers survive as many losses as 3, so use an odd number." });
  assert.equal(quorumAfter({ total: 3, reachable: 2 }, -1, true).warning.includes("no majority"), true);
  assert.equal(quorumAfter({ total: 1, reachable: 1 }, -1, true).managers, 0);
});

test("entries of the journal and events of Docker become lines", () => {
  const entry = fromHistory({ ID: "e1", Time: "2026-01-02T03:04:05Z", Kind: "request", Type: "service", ObjectID: "s1", Severity: "warning", Message: "scaled", By: { User: "alice", Through: "tls" } });
  assert.deepEqual([entry.level, entry.text, entry.target, entry.by], ["warn", "scaled", ["services", "s1"], "alice, tls"]);
  const event = fromEvent({ Type: "node", Action: "update", timeNano: 5e18, Actor: { ID: "n1", Attributes: { name: "w1", "state.new": "down", "state.old": "ready" } } });
  assert.deepEqual([event.level, event.text, event.target], ["bad", "node w1 update state down", ["nodes", "n1"]]);
});
test("the journal is read again only for another state, and falls back to events", async () => {
  const asked = [];
  const journal = new Journal(async (path) => {
    asked.push(path.split("?")[0]);
    if (path.startsWith("skep/history")) throw Object.assign(new Error("not found"), { status: 404 });
    return [{ Type: "service", Action: "create", timeNano: 5e9, Actor: { ID: "s1", Attributes: { name: "web" } } }];
  }, () => {});
  await journal.refresh(1, 10_000);
  await journal.refresh(1, 20_000);
  await journal.refresh(2, 20_001);
  assert.deepEqual(asked, ["skep/history", "events", "events"]);
  assert.equal(journal.entries.length, 1);
});
test("of many entries since the last read none is left out", async () => {
  let entries = [];
  const journal = new Journal(async (path) => {
    const query = new URLSearchParams(path.split("?")[1]);
    const [limit, from] = [Number(query.get("limit")), Number(query.get("cursor"))];
    const page = entries.slice(from, from + limit);
    return { Entries: page, Next: from + limit < entries.length ? String(from + limit) : "" };
  }, () => {});
  const add = (count, second) => {
    const at = (number) => new Date(second * 1000 + number).toISOString();
    entries = [...Array.from({ length: count }, (_, number) => ({ ID: `${second} ${number}`, Time: at(number) })), ...entries];
  };
  add(3, 1);
  await journal.refresh(1, 10_000);
  add(1200, 12);
  await journal.refresh(2, 20_000);
  assert.equal(journal.entries.length, 1203);
  add(2500, 32);
  await journal.refresh(3, 40_000);
  assert.equal(journal.entries.length, 2000, "the newest ones, within the bound");
});
test("a histogram has every entry of its span once", () => {
  const entries = [0, 10, 10, 99, 100, -1].map((at) => ({ at, level: "quiet" }));
  const parts = histogram(entries, 0, 100, 10);
  assert.equal(parts.reduce((sum, part) => sum + part.quiet, 0), 4);
  assert.equal(parts[1].quiet, 2);
});

for (const [given, expected] of [[undefined, "–"], [0.04, "0.04"], [12.54, "12.5"], [1284.5, "1\u202f285"]]) {
  test(`rate ${given}`, () => assert.equal(rate(given), expected));
}

for (const [given, expected] of [[undefined, "–"], [4.24, "4.2\u00a0ms"], [1500, "1.5\u00a0s"], [10_000, "over\u00a010\u00a0s"]]) {
  test(`latency ${given}`, () => assert.equal(latency(given), expected));
}

test("a change is refused if what the dialog showed has changed meanwhile", () => {
  const service = (replicas) => ({ Spec: { Name: "web", Mode: { Replicated: { Replicas: replicas } } } });
  const mode = ({ Spec: spec }) => spec.Mode;
  requireSame(service(3), service(3), mode);
  requireSame(null, service(3), mode);
  requireSame(service(3), service(9), ({ Spec: spec }) => spec.Name);
  assert.throws(() => requireSame(service(3), service(9), mode), /web has changed since this dialog was opened/);
});
