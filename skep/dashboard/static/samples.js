/** Load of each node in the last hour, recorded while this page is open.  No DOM here. */

export const SPAN_MS = 3600_000;
const SHORT_SPANS_MS = [300_000, 900_000];
const EVERY_MS = 10_000;
export const SAMPLES_MAX = SPAN_MS / EVERY_MS;

/** A ring of `[time, load, tasks]` for each node.  Three numbers of four bytes make 4 KB for an hour. */
class Ring {
  #values = new Float32Array(SAMPLES_MAX * 3);
  #begin = 0;
  count = 0;

  push(time, load, tasks) {
    const place = ((this.#begin + this.count) % SAMPLES_MAX) * 3;
    this.#values.set([time, load, tasks], place);
    if (this.count < SAMPLES_MAX) this.count += 1;
    else this.#begin = (this.#begin + 1) % SAMPLES_MAX;
  }

  *[Symbol.iterator]() {
    for (let i = 0; i < this.count; i += 1) {
      const place = ((this.#begin + i) % SAMPLES_MAX) * 3;
      const [time, load, tasks] = this.#values.subarray(place, place + 3);
      yield { time, load: Number.isNaN(load) ? null : load, tasks };
    }
  }
}

export class Samples {
  #rings = new Map();
  #at = -Infinity;
  #start = 0;

  /** Records a sample of each node, at most every ten seconds, and drops removed nodes. */
  take(cluster, now) {
    if (now - this.#at < EVERY_MS || cluster.cursor === "") return;
    if (this.#at === -Infinity) this.#start = now;
    this.#at = now;
    const tasks = cluster.by("tasks", "node");
    for (const node of cluster.all("nodes")) {
      const ring = this.#rings.get(node.id) ?? new Ring();
      this.#rings.set(node.id, ring);
      // Seconds since the page was opened, as a float of four bytes has too few digits for the time of day.
      ring.push((now - this.#start) / 1000, node.load ?? NaN, tasks.get(node.id)?.length ?? 0);
    }
    for (const id of this.#rings.keys()) if (cluster.get("nodes", id) === undefined) this.#rings.delete(id);
  }

  /** The milliseconds that a chart shows: few while the page was opened lately, so that its line is not a dot. */
  spanAt(now) {
    const age = this.#at === -Infinity ? 0 : now - this.#start;
    return SHORT_SPANS_MS.find((span) => age <= span) ?? SPAN_MS;
  }

  /** `[{at, load, tasks}]` of a node, the oldest first; `at` in milliseconds, `load` null if unknown. */
  of(id) {
    return [...(this.#rings.get(id) ?? [])].map(({ time, load, tasks }) => ({ at: this.#start + time * 1000, load, tasks }));
  }
}

/**
 * The lines of a chart: `[[[x, y], …], …]`, with a gap for unknown values and missing samples.
 * `x` is 0 to 1 from `from` to `to`, `y` 0 to 1 of `most`.
 */
export function lines(samples, value, { from, to, most }) {
  const found = [];
  let last = -Infinity;
  for (const sample of samples) {
    const height = value(sample);
    if (height === null || sample.at < from) {
      last = -Infinity;
      continue;
    }
    const point = [(sample.at - from) / (to - from), Math.min(1, height / most)];
    if (sample.at - last > 3 * EVERY_MS) found.push([point]);
    else found.at(-1).push(point);
    last = sample.at;
  }
  return found;
}
