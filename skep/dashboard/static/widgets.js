/** Small pieces that pages and panels share. */

import { h } from "./dom.js";
import { phase } from "./cluster.js";
import { lines } from "./samples.js";
import { age, clockTime, duration, imageName, instant, percent } from "./text.js";

const HEXAGON = "M6 1.500 10 3.750v4.500L6 10.500 2 8.250v-4.500z";
const CORE = "M6 4 7.800 5v2L6 8 4.200 7V5z";
const CROSS = "M3.900 3.900l4.200 4.200m0-4.200l-4.200 4.200";
const BAR = "M4 6h4";

/** The small hexagon of a task's phase: the same shapes and colors as in the hive. */
export function glyph(phaseName) {
  const has = (...names) => names.includes(phaseName);
  return h(
    "svg",
    { class: `glyph ${phaseName}`, viewBox: "0 0 12 12", "aria-hidden": "true" },
    has("running") && h("path", { class: "full", d: HEXAGON }),
    !has("running", "completed") && h("path", { class: "outline", d: HEXAGON }),
    has("starting", "stopping", "completed") && h("path", { class: "full", d: CORE }),
    has("failed") && h("path", { class: "mark", d: CROSS }),
    has("unhealthy", "unknown") && h("path", { class: "mark", d: BAR }),
  );
}

export function taskGlyph(task) {
  return glyph(phase(task));
}

const PHASE_OF_STATE = { healthy: "running", converging: "starting", degraded: "failed" };

/** The state of a service as a hexagon. */
export function serviceGlyph(service) {
  return glyph(PHASE_OF_STATE[service?.state] ?? "unknown");
}

const COPIED_MS = 2000;

/** A command with a button that copies it.  Its words stay whole, as a dash may end a line but not a word. */
export function command(app, text) {
  const said = app.memory.get("copied")?.text === text ? app.memory.get("copied").said : "Copy";
  return h("span", { class: "command" }, h("code", {}, text.split(" ").map((word) => [h("span", {}, word), " "])),
    h("button", { type: "button", "aria-label": said === "Copy" ? `Copy: ${text}` : said, onclick: (event) => void copy(app, text, event.currentTarget) }, said));
}

async function copy(app, text, button) {
  let said = "Copied";
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // The browser refuses without a secure connection or a permission, so the user copies the selected text.
    getSelection().selectAllChildren(button.previousSibling);
    said = "Press Ctrl-C";
  }
  const copied = { text, said };
  app.memory.set("copied", copied);
  app.invalidate();
  setTimeout(() => {
    if (app.memory.get("copied") === copied) app.memory.delete("copied");
    app.invalidate();
  }, COPIED_MS);
}

/** An empty list: what it would show, and one command that adds to it. */
export function emptyState(app, text, line) {
  return h("div", { class: "empty" }, h("p", {}, text), line && command(app, line));
}

/** A word in the color of a level: `good`, `warn`, `bad` or `quiet`. */
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

/** A node's `value(sample)` as a line; `most`: the top of the chart. */
export function chart(app, id, value, { size = "small", most = 1, label }) {
  const [width, height] = CHART[size];
  const to = app.realNow;
  const from = to - app.samples.spanAt(to);
  const shown = lines(app.samples.of(id), value, { from, to, most });
  const paths = shown.map((points) => points.map(([x, y], i) => `${i ? "L" : "M"}${(x * width).toFixed(1)} ${((1 - y) * (height - 2) + 1).toFixed(1)}`).join("") + (points.length === 1 ? "h1" : ""));
  return h("svg", { class: `chart ${size}`, viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img", "aria-label": label },
    size === "large" && [0.25, 0.5, 0.75].map((part) => h("path", { class: "grid", d: `M0 ${height * part}h${width}` })),
    h("path", { class: "line", d: paths.join("") }));
}

/** `hour` or `5 min` that the charts show. */
export function chartSpan(app) {
  const span = duration(app.samples.spanAt(app.realNow) / 1000);
  return span === "1 h" ? "hour" : span;
}

/** A large chart with the values of its axes. */
export function largeChart(app, id, value, { most = 1, top, label }) {
  return h("figure", {}, chart(app, id, value, { size: "large", most, label }),
    h("figcaption", {}, h("span", {}, `${duration(app.samples.spanAt(app.realNow) / 1000)} ago`), h("span", {}, `0 to ${top}`), h("span", {}, "now")));
}

/** `34 %, 12 % to 61 % since 10:02:00` of a node's load. */
export function loadInWords(app, node) {
  const loads = app.samples.of(node.id).filter(({ load }) => load !== null);
  const now = node.load === null ? "not reported" : percent(node.load);
  if (loads.length < 2) return now;
  const values = loads.map(({ load }) => load);
  const [least, most] = [percent(Math.min(...values)), percent(Math.max(...values))];
  return `${now}${least === most ? "" : `, ${least} to ${most}`} since ${clockTime(loads[0].at / 1000, app.realNow)}`;
}

/** `3 d` since an instant, with its time as title. */
export function since(app, at) {
  return h("time", { title: at ? clockTime(at, app.now) : "" }, at ? age(at, app.now) : "–");
}

/** `3 d ago`, with the time as title. */
export function ago(app, at) {
  return at ? h("time", { title: clockTime(at, app.now) }, `${age(at, app.now)} ago`) : "–";
}

/** An image in a list.  Where it is too long, its registry is cut, not its tag. */
export function imageCell(image) {
  const name = imageName(image);
  const at = name.lastIndexOf("/") + 1;
  return h("span", { class: "image", title: name }, h("span", {}, name.slice(0, at)), h("span", {}, name.slice(at)));
}

/** Rows of a name and a value; rows without a value are left out. */
export function facts(...rows) {
  const shown = rows.filter((row) => row && row[1] !== "" && row[1] !== null && row[1] !== undefined);
  return h("dl", { class: "facts" }, shown.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
}

export function section(title, ...content) {
  return h("section", {}, h("h3", {}, title), content);
}

/** A link to an object by its name. */
export function link(app, kind, id) {
  return h("a", { href: app.href(kind, id) }, app.cluster.name(kind, id));
}

export function links(app, kind, ids) {
  if (ids.length === 0) return h("span", { class: "quiet" }, "none");
  return ids.map((id, i) => [i > 0 && ", ", link(app, kind, id)]);
}

/** The answer of a request as `show(data)`, its error, or that it is still awaited. */
export function fetched(entry, show) {
  if (entry.error) return h("p", { class: "note bad" }, entry.error);
  if (entry.data === undefined) return h("p", { class: "note quiet" }, "Loading…");
  return show(entry.data);
}

export function button(label, onclick, { kind = "", title, disabled } = {}) {
  return h("button", { type: "button", class: kind, onclick, title, disabled }, label);
}

/** How long something took, or has taken until now. */
export function took(app, from, to) {
  const [start, end] = [instant(from), instant(to)];
  return start === null ? "–" : duration(((end ?? app.now) - start) / 1000);
}
