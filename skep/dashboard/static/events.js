/** The page of events, and the timeline below the hive which can be dragged back. */

import { h } from "./dom.js";
import { SPAN_MS, histogram } from "./journal.js";
import { clockTime } from "./text.js";

const SHOWN_MAX = 400;
const PARTS = 120;
const HEIGHT = 36;
const NOW_WITHIN_MS = 10_000;

/** Entries by time, those of a chosen level and text alone. */
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
        h("select", { "aria-label": "Which", value: only, onchange: set("events level") }, option("all", "All"), option("problems", "Problems"), option("requests", "Requests by people")),
        h("input", { type: "search", placeholder: "Filter", "aria-label": "Filter", value: words, oninput: set("events words") }))),
    timeline(app),
    app.journal.error && h("p", { key: "error", class: "note bad" }, app.journal.error),
    entries.length === 0
      ? h("p", { key: "empty", class: "empty" }, "Nothing happened in the last hour.")
      : h("ol", { key: "events", class: "events" }, entries.slice(0, SHOWN_MAX).map((entry) => line(app, entry))),
    entries.length > SHOWN_MAX && h("p", { key: "more", class: "note quiet" }, `and ${entries.length - SHOWN_MAX} earlier ones: skep history`),
  ];
}

const option = (value, title) => h("option", { value }, title);

function line(app, { key, at, level, text, target, by }) {
  return h("li", { key, class: level },
    h("time", {}, clockTime(at / 1000, app.now)),
    target ? h("a", { href: app.href(...target) }, text) : h("span", {}, text),
    by && h("span", { class: "quiet" }, by));
}

/** The last hour as bars, with a handle: before its end the cluster is shown as it was. */
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
  const canDrag = app.journal.oldestState !== null;
  return h(
    "div",
    { key: "timeline", class: app.past ? "timeline past" : "timeline" },
    h("div", { class: "bars" },
      h("svg", { viewBox: `0 0 ${PARTS * 4} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" },
        parts.flatMap((part, i) => bars(part, i, most)),
        app.past && h("rect", { class: "later", x: ((shown - from) / SPAN_MS) * PARTS * 4, y: 0, width: PARTS * 4, height: HEIGHT })),
      canDrag && h("input", { type: "range", "aria-label": "Time shown", "aria-valuetext": app.past ? clockTime(shown / 1000, app.now) : "now", min: Math.max(from, app.journal.oldestState), max: to, step: 1000, value: String(shown), oninput: choose,
        vars: { "--begin": `${(Math.max(0, app.journal.oldestState - from) / SPAN_MS) * 100}%` } })),
    h("div", { class: "scale" }, h("span", {}, clockTime(from / 1000, app.now).slice(0, -3)), h("span", {}, app.past ? clockTime(shown / 1000, app.now) : "the last hour"),
      app.past ? h("button", { type: "button", onclick: () => app.showPast(null) }, "Back to now") : h("span", {}, "now")),
  );
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
