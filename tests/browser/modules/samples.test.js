import assert from "node:assert/strict";
import { test } from "node:test";

import { Cluster } from "../../../skep/dashboard/static/cluster.js";
import { SAMPLES_MAX, Samples, lines } from "../../../skep/dashboard/static/samples.js";

function cluster(...nodes) {
  const made = new Cluster();
  made.take({ cursor: "1-1", nodes, tasks: [{ id: "t1", node: "a" }] });
  return made;
}

test("a node's load is kept every ten seconds, for an hour at most", () => {
  const samples = new Samples();
  const start = 1_800_000_000_000;
  for (let second = 0; second < 5000; second += 1) samples.take(cluster({ id: "a", load: (second % 100) / 100 }), start + second * 1000);
  const kept = samples.of("a");
  assert.equal(kept.length, SAMPLES_MAX);
  assert.equal(kept.at(-1).at, start + 4990_000);
  assert.equal(kept[0].at, start + 4990_000 - (SAMPLES_MAX - 1) * 10_000);
  assert.ok(Math.abs(kept.at(-1).load - 0.9) < 1e-6);
  assert.equal(kept[0].tasks, 1);
});

test("a load that is not known is a gap, and a node that is gone is forgotten", () => {
  const samples = new Samples();
  [0.5, null, 0.25, 0.75].forEach((load, i) => samples.take(cluster({ id: "a", load }, { id: "b", load: 0 }), i * 10_000));
  assert.deepEqual(samples.of("a").map(({ load }) => load), [0.5, null, 0.25, 0.75]);
  const drawn = lines(samples.of("a"), ({ load }) => load, { from: 0, to: 30_000, most: 1 });
  assert.deepEqual(drawn.map((line) => line.map(([x, y]) => [Math.round(x * 3), y])), [[[0, 0.5]], [[2, 0.25], [3, 0.75]]]);
  samples.take(cluster({ id: "a", load: 0 }), 50_000);
  assert.deepEqual(samples.of("b"), []);
});

test("a chart shows minutes after the page was opened, and an hour later", () => {
  const samples = new Samples();
  const start = 1_800_000_000_000;
  assert.equal(samples.spanAt(start), 300_000);
  samples.take(cluster({ id: "a", load: 0 }), start);
  assert.deepEqual([1, 5, 6, 15, 16, 60, 600].map((minutes) => samples.spanAt(start + minutes * 60_000) / 60_000), [5, 5, 15, 15, 60, 60, 60]);
});
