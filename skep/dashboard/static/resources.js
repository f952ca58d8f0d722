/** Answers to the page's requests, kept while it shows them. */

import { get } from "./api.js";

/** `use(path, version)` returns the last answer while drawing, and requests it again for another `version`. */
export class Resources {
  #entries = new Map();
  #used = new Set();
  #changed;

  constructor(changed) {
    this.#changed = changed;
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
    const entry = this.#entries.get(path) ?? { data: undefined, error: undefined, version: undefined, busy: false };
    this.#entries.set(path, entry);
    if (entry.version !== version && !entry.busy) this.#ask(path, entry, version);
    return entry;
  }

  async #ask(path, entry, version) {
    entry.busy = true;
    entry.version = version;
    try {
      entry.data = await get(path);
      entry.error = undefined;
    } catch (error) {
      entry.error = error.message;
    }
    entry.busy = false;
    this.#changed();
  }
}
