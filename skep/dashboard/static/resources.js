/** Answers to the page's requests, kept while it shows them. */

import { get } from "./api.js";

const AGAIN_MS = 5000;

/** `use(path, version)` returns the last answer while drawing, and requests it again for another `version` or after an error. */
export class Resources {
  #entries = new Map();
  #used = new Set();
  #changed;
  #ask;
  #now;

  /** `ask(path)` returns the JSON at a path; `now()` the time in milliseconds. */
  constructor(changed, ask = get, now = Date.now) {
    this.#changed = changed;
    this.#ask = ask;
    this.#now = now;
  }

  begin() {
    this.#used.clear();
  }

  /** Drops answers that were not used since `begin`. */
  end() {
    for (const path of this.#entries.keys()) if (!this.#used.has(path)) this.#entries.delete(path);
  }

  /** `{data, error}` of a path, both undefined until the first answer. */
  use(path, version) {
    this.#used.add(path);
    const entry = this.#entries.get(path) ?? { data: undefined, error: undefined, version: undefined, busy: false, failedAt: -Infinity };
    this.#entries.set(path, entry);
    const isDue = entry.version !== version || (entry.error !== undefined && this.#now() - entry.failedAt >= AGAIN_MS);
    if (isDue && !entry.busy) void this.#read(path, entry, version);
    return entry;
  }

  async #read(path, entry, version) {
    entry.busy = true;
    entry.version = version;
    try {
      entry.data = await this.#ask(path);
      entry.error = undefined;
    } catch (error) {
      entry.error = error.message;
      entry.failedAt = this.#now();
    }
    entry.busy = false;
    this.#changed();
  }
}
