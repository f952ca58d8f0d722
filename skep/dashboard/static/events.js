/** The page of events, and the timeline that shows the cluster at an earlier time. */

import { h } from "./dom.js";
import { SPAN_MS, histogram } from "./journal.js";
import { command, emptyState } from "./widgets.js";
import { clockTime, count } from "./text.js";

const SHOWN_MAX = 400;
const PARTS = 120;
const HEIGHT = 36;
const NOW_WITHIN_MS = 10_000;
const HISTORY = "skep history --since '1 day ago'";
const MARKS_MIN = [60, 45, 30, 15];

/** The entries, the newest first, filtered by level and text. */
export function eventsPage(app) {
  const only = app.memory.get("events level") ?? "all";
  const words = (app.memory.get("events words") ?? "").toLowerCase();
  const entries = app.journal.entries.filter(
    ({ level, kind, text }) => (only === "all" || (only === "requests" ? kind === "request" : level !== "quiet")) && text.toLowerCase().includes(words),
  );
  const set = (name) => (event) => {
    app.memory.set(name, event.target.value);
    app.invalidate();
  };
  return [
    h("div", { key: "head", class: "head" }, h("h1", {}, "Events"),
      h("div", { class: "filters" },
        h("select", { "aria-label": "Which", value: only, onchange: set("events level") }, option("all", "All"), option("problems", "Problems"), option("requests", "Requests of users")),
        h("input", { type: "search", placeholder: "Filter", "aria-label": "Filter", value: words, oninput: set("events words") }))),
    timeline(app),
    app.journal.error && h("p", { key: "error", class: "note bad" }, app.journal.error),
    entries.length === 0
      ? h("div", { key: "empty" }, !app.journal.isRead ? h("p", { class: "empty" }, app.journal.error ? "" : "Loading…") : app.journal.entries.length > 0 ? h("p", { class: "empty" }, "No events match.") : emptyState(app, "Nothing happened in the last hour. This command shows more.", HISTORY))
      : h("ol", { key: "events", class: "events" }, entries.slice(0, SHOWN_MAX).map((entry) => line(app, entry))),
    entries.length > SHOWN_MAX && h("p", { key: "more", class: "note quiet" }, `and ${count(entries.length - SHOWN_MAX, "earlier event")}: `, command(app, HISTORY)),
  ];
}

const option = (value, title) => h("option", { value }, title);

function line(app, { key, at, level, text, target, by }) {
  return h("li", { key, class: level },
    h("time", {}, clockTime(at / 1000, app.now)),
    target ? h("a", { href: app.href(...target) }, text) : h("span", {}, text),
    by && h("span", { class: "quiet" }, by));
}

/** The last hour as bars, with a handle that shows the cluster at an earlier time. */
export function timeline(app) {
  const to = app.realNow;
  const from = to - SPAN_MS;
  const parts = histogram(app.journal.entries, from, to, PARTS);
  const most = Math.max(4, ...parts.map((part) => part.quiet + part.warn + part.bad));
  const shown = app.past ?? to;
  const choose = (event) => {
    const at = Number(event.target.value);
    app.showPast(to - at < NOW_WITHIN_MS ? null : at);
  };
  const point = (event) => {
    const { left, width } = event.currentTarget.getBoundingClientRect();
    app.memory.set("pointed part", Math.floor(((event.clientX - left) / width) * PARTS));
    app.invalidate();
  };
  const leave = () => {
    app.memory.delete("pointed part");
    app.invalidate();
  };
  const oldest = app.journal.oldestState;
  const pointed = app.memory.get("pointed part");
  return h(
    "div",
    { key: "timeline", class: app.past ? "timeline past" : "timeline" },
    h("div", { class: "scale" },
      h("h2", {}, "Events of the last hour"),
      h("ul", { class: "levels", "aria-label": "Colors of the timeline" }, LEVELS.map(([level, word]) => h("li", { key: level, class: level }, word))),
      h("p", {}, pointed === undefined ? (oldest !== null && app.past === null ? "Drag the handle to go back in time" : "") : partInWords(parts[pointed], from + (pointed * SPAN_MS) / PARTS)),
      app.past && h("button", { type: "button", onclick: () => app.showPast(null) }, "Back to now")),
    h("div", { class: "bars", onpointermove: point, onpointerleave: leave },
      h("svg", { viewBox: `0 0 ${PARTS * 4} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" },
        parts.flatMap((part, i) => bars(part, i, most)),
        app.past && h("rect", { class: "later", x: ((shown - from) / SPAN_MS) * PARTS * 4, y: 0, width: PARTS * 4, height: HEIGHT })),
      oldest !== null && h("input", { type: "range", "aria-label": "Time shown", "aria-valuetext": app.past ? clockTime(shown / 1000, app.now) : "now", min: Math.max(from, oldest), max: to, step: 1000, value: String(shown), oninput: choose,
        vars: { "--begin": `${(Math.max(0, oldest - from) / SPAN_MS) * 100}%` } })),
    h("div", { class: "marks", "aria-hidden": "true" },
      MARKS_MIN.map((minutes) => h("span", { key: String(minutes) }, timeOfDay(to - minutes * 60_000))), h("span", { key: "now" }, "now")),
  );
}

const LEVELS = [["quiet", "normal"], ["warn", "warning"], ["bad", "error"]];

const timeOfDay = (at) => new Date(at).toTimeString().slice(0, 5);

/** `23:41: 3 events, 1 error` of one bar. */
function partInWords(part, at) {
  const total = part ? part.quiet + part.warn + part.bad : 0;
  const words = [total === 0 ? "no events" : count(total, "event"), part?.bad && count(part.bad, "error"), part?.warn && count(part.warn, "warning")];
  return `${timeOfDay(at)}: ${words.filter(Boolean).join(", ")}`;
}

function bars(part, i, most) {
  let y = HEIGHT;
  return ["quiet", "warn", "bad"].flatMap((level) => {
    if (part[level] === 0) return [];
    const height = Math.max(1.5, (part[level] / most) * (HEIGHT - 4));
    y -= height;
    return [h("rect", { class: level, x: i * 4, y, width: 3, height })];
  });
}
