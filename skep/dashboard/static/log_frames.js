/** The stream of a log as lines, across reconnections.  No DOM here. */

const OPTIONS = "stdout=1&stderr=1&follow=1&timestamps=1&details=1";
const TAIL = 200;
const DELAYS_S = [1, 2, 4, 8, 15, 30];
// Lines of the last minute are requested again, because the clock of a line's node may be behind that of the last line.
const CLOCKS_DIFFER_MS = 60_000;
const HEADER = 8;
const FRAME_MAX = 1 << 20;
// Any attribute may follow the three ids: labels and variables that a service logs, or that a line was kept.
const DETAIL = /^(com\.docker\.swarm\.[a-z.]+=[^, ]*(?:,[^=, ]+=[^, ]*)*) /;
const STAMP = /^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[^ ]*) /;
// Sequences that move the cursor or change colors in a terminal.
const ESCAPES = /\u001b(?:\[[0-?]*[ -/]*[@-~]|\][^\u0007\u001b]*(?:\u0007|\u001b\\)|[@-Z\\-_])/g;

/** Text without terminal sequences. */
export const withoutEscapes = (text) => text.replace(ESCAPES, "");

/** Cuts chunks into `{stream: "stdout"|"stderr", text}`; `multiplexed`: with Docker's headers of 8 bytes. */
export class Frames {
  #rest = new Uint8Array(0);
  #decoder = new TextDecoder();
  #multiplexed;

  constructor(multiplexed) {
    this.#multiplexed = multiplexed;
  }

  /** Throws for a frame that is larger than any line. */
  take(chunk) {
    const bytes = new Uint8Array(this.#rest.length + chunk.length);
    bytes.set(this.#rest);
    bytes.set(chunk, this.#rest.length);
    return this.#multiplexed ? this.#frames(bytes) : this.#lines(bytes);
  }

  #frames(bytes) {
    const found = [];
    let at = 0;
    while (bytes.length - at >= HEADER) {
      const length = new DataView(bytes.buffer, at + 4, 4).getUint32(0);
      if (length > FRAME_MAX) throw new Error(`a frame of ${length} bytes`);
      if (bytes.length - at < HEADER + length) break;
      const text = this.#decoder.decode(bytes.subarray(at + HEADER, at + HEADER + length));
      found.push({ stream: bytes[at] === 2 ? "stderr" : "stdout", text: text.replace(/\r?\n$/, "") });
      at += HEADER + length;
    }
    this.#rest = bytes.slice(at);
    return found;
  }

  #lines(bytes) {
    const end = bytes.lastIndexOf(10);
    this.#rest = bytes.slice(end + 1);
    if (end < 0) {
      if (this.#rest.length > FRAME_MAX) this.#rest = new Uint8Array(0);
      return [];
    }
    return this.#decoder.decode(bytes.subarray(0, end)).split("\n").map((text) => ({ stream: "stdout", text: text.replace(/\r$/, "") }));
  }
}

/** A line with details and timestamp as `{at, task, text}`. */
export function parsedLine(line) {
  let text = line;
  let at = "";
  let task = "";
  // The API puts the timestamp before the details.  Both orders are accepted.
  for (let i = 0; i < 2; i += 1) {
    const stamp = STAMP.exec(text);
    if (stamp && !at) {
      at = stamp[1];
      text = text.slice(stamp[0].length);
    }
    const detail = DETAIL.exec(text);
    if (detail && !task) {
      task = /task\.id=([^, ]+)/.exec(detail[1])?.[1] ?? "";
      text = text.slice(detail[0].length);
    }
  }
  return { at, task, text: withoutEscapes(text) };
}

/** The last line of each task, after which a new request continues. */
export class LogPosition {
  #last = new Map();
  #shown = new Map();

  /** The part of the next request's query that skips earlier lines. */
  query() {
    this.#shown = new Map(this.#last);
    const times = [...this.#last.values()].map((at) => Date.parse(at)).filter(Number.isFinite);
    if (times.length === 0) return `tail=${TAIL}`;
    const since = Math.max(Math.min(...times), Math.max(...times) - CLOCKS_DIFFER_MS);
    return `tail=all&since=${Math.floor(since / 1000)}`;
  }

  /** Whether no earlier request had the line.  Lines of a task are in the order of their times. */
  isNew(text) {
    const { at, task } = parsedLine(text);
    if (!at) return true;
    this.#last.set(task, at);
    return !(at <= (this.#shown.get(task) ?? ""));
  }
}

/**
 * Follows the log of `services/ID` or `tasks/ID`, and requests it again after a lost connection.  Calls `take(lines)` and
 * `say(state)`.  Ends when `signal` aborts, when the request is refused, or when the stream ends and `isOver()`.
 */
export async function followLog(stream, path, signal, { take, say, isOver, pause = paused }) {
  const position = new LogPosition();
  let [failures, isEmpty] = [0, true];
  while (!signal.aborted) {
    let [frames, reason] = [null, "The connection has ended"];
    say(isEmpty ? "No output yet. Following…" : "Following…");
    try {
      await stream(`v1.43/${path}/logs?${OPTIONS}&${position.query()}`, signal, (chunk, type) => {
        frames ??= new Frames(!type.includes("raw-stream"));
        const lines = frames.take(chunk).filter(({ text }) => position.isNew(text));
        if (lines.length === 0) return;
        [failures, isEmpty] = [0, false];
        say("Following…");
        take(lines);
      });
      if (isOver()) return say("The log has ended.");
    } catch (error) {
      if (signal.aborted) return undefined;
      // A browser's error of a connection is a TypeError.
      if (!(error instanceof TypeError) && !(error.status >= 500)) return say(error.message);
      reason = error instanceof TypeError ? "No connection" : error.message;
    }
    const delay = DELAYS_S[Math.min(failures, DELAYS_S.length - 1)] * (0.75 + Math.random() / 2);
    failures += 1;
    say(`${reason}. Reconnecting…`);
    await pause(delay * 1000, signal);
  }
  return undefined;
}

/** Waits until the time is over or `signal` aborts. */
const paused = (milliseconds, signal) =>
  new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      resolve();
    });
  });
