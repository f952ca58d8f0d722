/** The events of the last hour: the leader's journal, or Docker's events if a manager keeps none.  No DOM here. */

import { instant } from "./text.js";

export const SPAN_MS = 3600_000;
const KEPT_MAX = 2000;
const PAGE = 500;
const AGAIN_MS = 2000;
const KINDS = { service: "services", task: "tasks", node: "nodes", network: "networks", volume: "volumes", secret: "secrets", config: "configs" };

/** An entry of the journal as the page shows it: `{key, at, level, text, target, by}`. */
export function fromHistory(entry) {
  const level = { error: "bad", warning: "warn" }[entry.Severity] ?? "quiet";
  const by = entry.By ? [entry.By.User, entry.By.Through].filter(Boolean).join(", ") : "";
  const text = entry.Message || `${entry.Type} ${entry.Name ?? ""} ${entry.Action}`;
  return { key: entry.ID, at: instant(entry.Time) ?? 0, level, text, target: targetOf(entry.Type, entry.ObjectID), by, kind: entry.Kind };
}

/** One of Docker's events. */
export function fromEvent(event) {
  const { ID: id, Attributes: attributes = {} } = event.Actor ?? {};
  const changed = Object.entries(attributes).filter(([name]) => name.endsWith(".new")).map(([name, value]) => `${name.slice(0, -4)} ${value}`);
  const level = /fail|reject|oom|down/.test(`${event.Action} ${changed}`) ? "bad" : "quiet";
  const text = [event.Type, attributes.name ?? id, event.Action, changed.join(", ")].filter(Boolean).join(" ");
  return { key: `${event.timeNano} ${event.Type} ${id} ${event.Action}`, at: event.timeNano / 1e6, level, text, target: targetOf(event.Type, id), by: "", kind: "change" };
}

function targetOf(type, id) {
  return KINDS[type] && id ? [KINDS[type], id] : null;
}

/** The entries, newest first, fetched again when the cluster has changed. */
export class Journal {
  entries = [];
  /** Whether the first answer has arrived. */
  isRead = false;
  error = "";
  /** The earliest time that the page can show (milliseconds), or null. */
  oldestState = null;
  #ask;
  #changed;
  #hasHistory = true;
  #asked = -Infinity;
  #version = -1;
  #busy = false;

  /** `ask(path)` returns the answer's JSON. */
  constructor(ask, changed) {
    this.#ask = ask;
    this.#changed = changed;
  }

  /** Fetches new entries if the cluster's `version` has changed, at most every two seconds. */
  async refresh(version, now) {
    if (this.#busy || version === this.#version) return;
    if (now - this.#asked < AGAIN_MS) return;
    this.#busy = true;
    this.#asked = now;
    this.#version = version;
    try {
      this.#merge(await this.#newer(now), now);
      this.isRead = true;
      this.error = "";
    } catch (error) {
      this.error = error.message;
      this.#version = -1; // The cluster may not change for long after the connection returns.
    }
    this.#busy = false;
    this.#changed();
  }

  async #newer(now) {
    // Five seconds overlap, because entries of one moment may become visible one after the other.
    const since = Math.floor(((this.entries[0]?.at ?? now - SPAN_MS) - 5000) / 1000);
    if (this.#hasHistory) {
      try {
        const found = [];
        let next = "";
        do {
          const answer = await this.#ask(`skep/history?since=${since}&limit=${PAGE}&cursor=${encodeURIComponent(next)}`);
          this.oldestState = instant(answer.OldestState);
          found.push(...answer.Entries.map(fromHistory));
          next = answer.Next;
        } while (next && found.length < KEPT_MAX);
        return found;
      } catch (error) {
        if (![403, 404, 501].includes(error.status)) throw error;
        this.#hasHistory = false;
      }
    }
    const filters = encodeURIComponent(JSON.stringify({ scope: ["swarm"], type: ["service", "node", "task", "network", "secret", "config"] }));
    const lines = await this.#ask(`events?since=${since}&until=${Math.floor(now / 1000)}&filters=${filters}`);
    return (Array.isArray(lines) ? lines : [lines]).filter((event) => event?.Type).map(fromEvent).reverse();
  }

  #merge(found, now) {
    const known = new Set(this.entries.map(({ key }) => key));
    const fresh = found.filter(({ key, at }) => !known.has(key) && at <= now + 60_000);
    if (fresh.length === 0) return;
    this.entries = [...fresh, ...this.entries].sort((a, b) => b.at - a.at).slice(0, KEPT_MAX);
  }
}

/** The number of entries by level in each of `count` equal parts of the time from `from` to `to`. */
export function histogram(entries, from, to, count) {
  const parts = Array.from({ length: count }, () => ({ quiet: 0, warn: 0, bad: 0 }));
  for (const { at, level } of entries) {
    const part = Math.floor(((at - from) / (to - from)) * count);
    if (part >= 0 && part < count) parts[part][level] += 1;
  }
  return parts;
}
