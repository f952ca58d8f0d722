/** Small pieces that pages and panels share. */

import { h } from "./dom.js";
import { phase } from "./cluster.js";
import { SPAN_MS, lines } from "./samples.js";
import { age, clockTime, duration, instant, percent } from "./text.js";

const GLYPHS = {
  waiting: "M6 1.500 10 3.750v4.500L6 10.500 2 8.250v-4.500z",
  starting: "M6 1.500 10 3.750v4.500L6 10.500 2 8.250v-4.500zM6 4.500 7.400 5.250v1.500L6 7.500 4.600 6.750v-1.500z",
  cross: "M3.500 3.500l5 5m0-5l-5 5",
  bar: "M3.500 6h5",
};

/** The small hexagon of a task's phase, in the colour of its service: the same shapes as in the hive. */
export function glyph(phaseName, colour) {
  const isFull = ["running", "unhealthy", "stopping"].includes(phaseName);
  return h(
    "svg",
    { class: `glyph ${phaseName}`, viewBox: "0 0 12 12", "aria-hidden": "true", vars: { "--service": colour } },
    h("path", { class: isFull ? "full" : "outline", d: GLYPHS.waiting }),
    phaseName === "starting" && h("path", { class: "full", d: "M6 3.900 7.900 5v2L6 8.100 4.100 7V5z" }),
    phaseName === "done" && h("path", { class: "full", d: "M6 4.500 7.400 5.250v1.500L6 7.500 4.600 6.750v-1.500z" }),
    phaseName === "failed" && h("path", { class: "mark", d: GLYPHS.cross }),
    ["unhealthy", "unknown"].includes(phaseName) && h("path", { class: "mark", d: GLYPHS.bar }),
  );
}

export function taskGlyph(app, task) {
  return glyph(phase(task), app.colour(task.service));
}

/** A service's colour as a hexagon. */
export function swatch(app, id) {
  return glyph("running", app.colour(id));
}

/** A word with a state's weight: `good`, `warn`, `bad` or `quiet`. */
export function badge(level, text) {
  return h("span", { class: `badge ${level}` }, text);
}

/** A bar of shares: `[{share, kind}]`. */
export function meter(label, parts) {
  return h(
    "span",
    { class: "meter", role: "img", "aria-label": label },
    parts.map(({ share, kind }) => h("i", { class: kind, vars: { width: `${Math.min(100, Math.max(0, share * 100))}%` } })),
  );
}

const CHART = { small: [96, 20], large: [320, 72] };

/** The last hour of a node's `value(sample)` as a line; `most`: the top of the chart. */
export function chart(app, id, value, { size = "small", most = 1, label }) {
  const [width, height] = CHART[size];
  const to = app.realNow;
  const from = to - SPAN_MS;
  const shown = lines(app.samples.of(id), value, { from, to, most });
  const paths = shown.map((points) => points.map(([x, y], i) => `${i ? "L" : "M"}${(x * width).toFixed(1)} ${((1 - y) * (height - 2) + 1).toFixed(1)}`).join("") + (points.length === 1 ? "h1" : ""));
  return h("svg", { class: `chart ${size}`, viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img", "aria-label": label },
    size === "large" && [0.25, 0.5, 0.75].map((part) => h("path", { class: "grid", d: `M0 ${height * part}h${width}` })),
    h("path", { class: "line", d: paths.join("") }));
}

/** `34 %, 12–61 % since 10:02` of a node's load. */
export function loadInWords(app, node) {
  const loads = app.samples.of(node.id).filter(({ load }) => load !== null);
  const now = node.load === null ? "not reported" : percent(node.load);
  if (loads.length < 2) return now;
  const values = loads.map(({ load }) => load);
  return `${now}, ${percent(Math.min(...values))} to ${percent(Math.max(...values))} since ${clockTime(loads[0].at / 1000, app.realNow)}`;
}

/** How long ago, with the moment itself as title. */
export function ago(app, at) {
  return h("time", { title: at ? clockTime(at, app.now) : "" }, at ? age(at, app.now) : "–");
}

/** Rows of a name and a value; rows without a value are left out. */
export function facts(...rows) {
  const shown = rows.filter((row) => row && row[1] !== "" && row[1] !== null && row[1] !== undefined);
  return h("dl", { class: "facts" }, shown.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
}

export function section(title, ...content) {
  return h("section", {}, h("h3", {}, title), content);
}

/** A link to something by its name, with its service's colour where it has one. */
export function link(app, kind, id) {
  return h("a", { href: app.href(kind, id) }, app.cluster.name(kind, id));
}

export function links(app, kind, ids) {
  if (ids.length === 0) return h("span", { class: "quiet" }, "none");
  return ids.map((id, i) => [i > 0 && ", ", link(app, kind, id)]);
}

/** What a request brings: its error, that it is under way, or `show(data)`. */
export function fetched(entry, show) {
  if (entry.error) return h("p", { class: "note bad" }, entry.error);
  if (entry.data === undefined) return h("p", { class: "note quiet" }, "…");
  return show(entry.data);
}

export function button(label, onclick, { kind = "", title, disabled } = {}) {
  return h("button", { type: "button", class: kind, onclick, title, disabled }, label);
}

/** How long something took, or has taken so far. */
export function took(app, from, to) {
  const [start, end] = [instant(from), instant(to)];
  return start === null ? "–" : duration(((end ?? app.now) - start) / 1000);
}
