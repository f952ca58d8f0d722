/** Paths between nodes: failing probes, and diagnostics on request.  No DOM here. */

/** Failing probes as `[{from, to, check, port}]`, `from` is a node's row. */
export function failing(nodes) {
  return nodes.flatMap((node) => (node.failing_checks ?? []).map(({ peer, check, port }) => ({ from: node, to: peer, check, port })));
}

/**
 * The state of diagnostics from their lines so far, `{asked, done, errors, pairs, slowest, wrong}`: `errors`: nodes
 * without a result, and why; `wrong`: `[{from, to, check, port, lost, sent, detail}]`; `slowest`: milliseconds.
 */
export function diagnosed(lines) {
  const [begin, ...results] = lines;
  const found = { asked: begin?.Nodes?.length ?? 0, done: 0, errors: [], pairs: 0, slowest: null, wrong: [], own: [] };
  for (const result of results) {
    found.done += 1;
    const name = result.Hostname || result.ID;
    if (result.Error) found.errors.push({ name, error: result.Error });
    for (const text of result.Conditions ?? []) found.own.push({ name, text });
    for (const path of result.Paths ?? []) {
      if (path.PeerID !== result.ID) found.pairs += 1;
      for (const finding of path.Findings ?? []) {
        if (finding.Failing) {
          found.wrong.push({ from: name, to: path.Peer, check: finding.Check, port: finding.Port, lost: finding.Lost, sent: finding.Sent, detail: finding.Detail ?? "" });
        }
        const trip = finding.RoundTripMs;
        if (typeof trip === "number" && trip > (found.slowest?.ms ?? -1)) found.slowest = { ms: trip, from: name, to: path.Peer };
      }
    }
  }
  return found;
}

const LINE_MAX = 1 << 20;

/** Splits a stream of bytes into lines of JSON, and throws for a line of more than a megabyte. */
export class JsonLines {
  lines = [];
  #rest = "";
  #decoder = new TextDecoder();

  take(piece) {
    const parts = (this.#rest + this.#decoder.decode(piece, { stream: true })).split("\n");
    this.#rest = parts.pop();
    if (this.#rest.length > LINE_MAX) throw new Error("the response is too long");
    for (const part of parts) if (part.trim() !== "") this.lines.push(JSON.parse(part));
  }
}

/** Runs diagnostics one at a time, and calls `changed()` for each line. */
export class Diagnostics {
  lines = [];
  error = "";
  isRunning = false;
  /** Milliseconds, or 0 before the first run. */
  endedAt = 0;
  #stream;
  #changed;

  /** `stream(path, signal, take)` as in `api.js`. */
  constructor(stream, changed) {
    this.#stream = stream;
    this.#changed = changed;
  }

  async run() {
    if (this.isRunning) return;
    const json = new JsonLines();
    this.lines = json.lines;
    this.error = "";
    this.isRunning = true;
    this.#changed();
    try {
      await this.#stream("skep/doctor/network", AbortSignal.timeout(60_000), (piece) => {
        json.take(piece);
        this.#changed();
      });
    } catch (error) {
      this.error = error.message;
    }
    this.isRunning = false;
    this.endedAt = Date.now();
    this.#changed();
  }
}
