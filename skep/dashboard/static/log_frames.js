/** The stream of a log as lines.  No DOM here. */

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
