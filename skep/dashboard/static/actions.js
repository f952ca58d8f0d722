/** Actions.  Each shows its effects first, and sends nothing until the user confirms. */

import { get, post } from "./api.js";
import { h } from "./dom.js";
import { isCounted } from "./cluster.js";
import { dialogHead, openDialog } from "./dialogs.js";
import { button } from "./widgets.js";
import { course, difference, missingRole, quorumAfter, requireSame, restarted, scaled, whenDrained, withImage } from "./plans.js";
import { count, imageName } from "./text.js";

const REPLICAS_MAX = 100_000;
const PREVIEW_AFTER_MS = 250;

/** The buttons of a service, the most likely one first, those that undo something last. */
export function serviceActions(app, service) {
  if (app.past !== null) return [];
  const needed = missingRole(app.session, { role: "operator", stack: service.stack });
  if (needed) return [h("p", { class: "quiet" }, needed)];
  const isUpdating = service.update?.state === "updating" || service.update?.state === "rollback_started";
  const isPaused = service.update?.state?.endsWith("paused");
  const isJob = service.mode.endsWith("-job");
  const primary = { kind: "primary" };
  return [
    isUpdating && button("Pause update", () => simpleDialog(app, { title: `Pause the update of ${service.name}`, verb: "Pause", lines: ["No more tasks are replaced until you resume the update."], path: `skep/services/${service.id}/update/pause` }), primary),
    isPaused && button("Resume update", () => simpleDialog(app, { title: `Resume the update of ${service.name}`, verb: "Resume", lines: ["The update replaces the remaining tasks."], path: `skep/services/${service.id}/update/resume` }), primary),
    service.mode === "replicated" && button("Scale", () => scaleDialog(app, service), isUpdating || isPaused ? {} : primary),
    !isJob && button("Update image", () => imageDialog(app, service)),
    !isJob && button("Restart", () => specDialog(app, service, { title: `Restart ${service.name}`, verb: "Restart", change: restarted })),
    service.can_roll_back && button("Roll back", () => rollBackDialog(app, service), { kind: "undo" }),
  ];
}

/** The buttons of a node. */
export function nodeActions(app, node) {
  if (app.past !== null) return [];
  const needed = missingRole(app.session, { role: "admin" });
  if (needed) return [h("p", { class: "quiet" }, needed)];
  const isActive = node.availability === "active";
  const isManager = node.role === "manager";
  return [
    !isActive && button("Activate", () => nodeDialog(app, node, { title: `Activate ${node.name}`, verb: "Activate", lines: ["The node accepts tasks again. Running tasks stay where they are. Global services start a task here."], change: { Availability: "active" } }), { kind: "primary" }),
    isActive && button("Pause scheduling", () => nodeDialog(app, node, { title: `Pause scheduling on ${node.name}`, verb: "Pause", lines: ["The node accepts no new tasks. Its tasks keep running."], change: { Availability: "pause" } })),
    !isManager && button("Promote", () => roleDialog(app, node, "manager")),
    node.availability !== "drain" && button("Drain", () => drainDialog(app, node), { kind: "undo" }),
    isManager && button("Demote", () => roleDialog(app, node, "worker"), { kind: "undo" }),
  ];
}

/**
 * A dialog that shows `lines` and the content of `more(redraw)`, and calls `act()` when the user confirms.
 * `canAct()`: whether the button is enabled.
 */
function confirmDialog({ title, verb, lines, more, act, canAct = () => true, isDanger = false }) {
  let error = "";
  let isBusy = false;
  openDialog(title, "confirm", (redraw, close) => {
    const submit = async (event) => {
      event.preventDefault();
      if (isBusy || !canAct()) return;
      isBusy = true;
      error = "";
      redraw();
      try {
        await act();
        close();
      } catch (failure) {
        error = failure.message;
        isBusy = false;
        redraw();
      }
    };
    return [
      dialogHead(title, close),
      h("form", { onsubmit: submit },
        lines().map((line) => h("p", {}, line)),
        more?.(redraw),
        error && h("p", { class: "note bad", role: "alert" }, error),
        h("div", { class: "buttons" }, button("Cancel", close), h("button", { type: "submit", class: isDanger ? "primary danger" : "primary", disabled: isBusy || !canAct() }, isBusy ? "…" : verb))),
    ];
  });
}

/** The number of a service's tasks by node. */
function tasksByNode(app, service) {
  const numbers = new Map();
  for (const task of app.cluster.tasksOf("service", service.id)) if (isCounted(task)) numbers.set(task.node, (numbers.get(task.node) ?? 0) + 1);
  return numbers;
}

/** The service as its dialog shows it, or null if it cannot be read. */
const read = (service) => get(`services/${service.id}`).catch(() => null);

/**
 * Reads the service, changes its spec, and writes it back at the version that was read.  Refuses if `part` of the service
 * has changed since `shown` was read.
 */
async function changeService(id, change, { query = "", shown = null, part = () => null } = {}) {
  const [before, service] = await Promise.all([shown, get(`services/${id}`)]);
  requireSame(before, service, part);
  await post(`services/${id}/update?version=${service.Version.Index}${query}`, change(service.Spec));
}

/** Where the scheduler would place the tasks of a changed spec. */
class Preview {
  text = "…";
  rows = [];
  refusal = "";
  #timer = null;
  #asked = 0;

  /** Asks the scheduler when the input has rested for a moment, and calls `redraw` with the answer. */
  ask(id, change, before, redraw) {
    this.#asked += 1;
    const mine = this.#asked;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(async () => {
      try {
        const service = await get(`services/${id}`);
        const [placement] = await post("skep/services/placement", [change(service.Spec)]);
        if (mine !== this.#asked) return;
        this.refusal = placement.Error ?? "";
        this.rows = difference(placement, before).filter((row) => row.after !== row.before);
        this.text = "";
      } catch (error) {
        if (mine !== this.#asked) return;
        this.text = `No preview: ${error.message}`;
      }
      redraw();
    }, PREVIEW_AFTER_MS);
  }

  show(app) {
    if (this.text) return h("p", { class: "quiet" }, this.text);
    return h("div", { class: "preview", "aria-live": "polite" },
      this.refusal && h("p", { class: "note bad" }, this.refusal),
      this.rows.length === 0 && !this.refusal && h("p", { class: "quiet" }, "No change on any node."),
      h("ul", { class: "plain" }, this.rows.slice(0, 12).map(({ node, hostname, before, after }) =>
        h("li", { key: node, class: after > before ? "more" : "fewer" }, h("b", {}, after > before ? `+${after - before}` : `−${before - after}`), ` ${hostname || app.cluster.name("nodes", node)} `, h("span", { class: "quiet" }, `${before} → ${after}`)))),
      this.rows.length > 12 && h("p", { class: "quiet" }, `and ${count(this.rows.length - 12, "more node")}`));
  }
}

function scaleDialog(app, service) {
  let replicas = service.desired;
  const before = tasksByNode(app, service);
  const shown = read(service);
  const preview = new Preview();
  const isValid = () => Number.isInteger(replicas) && replicas >= 0 && replicas <= REPLICAS_MAX;
  let isFirst = true;
  confirmDialog({
    title: `Scale ${service.name}`,
    verb: "Scale",
    lines: () => [],
    canAct: () => isValid() && replicas !== service.desired,
    act: () => changeService(service.id, (spec) => scaled(spec, replicas), { shown, part: ({ Spec: spec }) => spec.Mode }),
    more: (redraw) => {
      const set = (number) => {
        replicas = number;
        if (isValid()) preview.ask(service.id, (spec) => scaled(spec, replicas), before, redraw);
        redraw();
      };
      if (isFirst) {
        isFirst = false;
        preview.ask(service.id, (spec) => scaled(spec, replicas), before, redraw);
      }
      return [
        h("div", { class: "stepper" },
          h("label", { for: "replicas" }, "Replicas"),
          h("button", { type: "button", "aria-label": "One fewer", onclick: () => set(Math.max(0, replicas - 1)) }, "−"),
          h("input", { id: "replicas", type: "number", min: "0", max: String(REPLICAS_MAX), value: String(replicas), autofocus: true, oninput: (event) => set(event.target.valueAsNumber) }),
          h("button", { type: "button", "aria-label": "One more", onclick: () => set(replicas + 1) }, "+"),
          h("span", { class: "quiet" }, `now ${service.desired}`)),
        h("h3", {}, "Effect"),
        preview.show(app),
      ];
    },
    isDanger: false,
  });
}

function imageDialog(app, service) {
  let image = service.image;
  const shown = read(service);
  const tasks = [...tasksByNode(app, service).values()].reduce((sum, number) => sum + number, 0);
  let plan = "…";
  let isFirst = true;
  confirmDialog({
    title: `Update the image of ${service.name}`,
    verb: "Update",
    lines: () => [],
    canAct: () => image.trim() !== "" && image !== service.image,
    act: () => changeService(service.id, (spec) => withImage(spec, image.trim()), { shown, part: ({ Spec: spec }) => spec.TaskTemplate.ContainerSpec?.Image }),
    more: (redraw) => {
      if (isFirst) {
        isFirst = false;
        void courseOf(service.id, tasks).then((text) => {
          plan = text;
          redraw();
        });
      }
      return [
        h("label", { class: "wide" }, "Image", h("input", { type: "text", value: image, spellcheck: "false", autocomplete: "off", autofocus: true, oninput: (event) => {
          image = event.target.value;
          redraw();
        } })),
        h("h3", {}, "Effect"),
        h("p", {}, h("code", {}, imageName(service.image)), " → ", h("code", {}, imageName(image) || "…")),
        h("p", {}, plan),
      ];
    },
  });
}

async function courseOf(id, tasks) {
  try {
    return course((await get(`services/${id}`)).Spec, tasks);
  } catch (error) {
    return error.message;
  }
}

function specDialog(app, service, { title, verb, change }) {
  const tasks = [...tasksByNode(app, service).values()].reduce((sum, number) => sum + number, 0);
  let plan = "…";
  let isFirst = true;
  confirmDialog({
    title,
    verb,
    lines: () => [plan],
    act: () => changeService(service.id, change),
    more: (redraw) => {
      if (isFirst) {
        isFirst = false;
        void courseOf(service.id, tasks).then((text) => {
          plan = text;
          redraw();
        });
      }
      return null;
    },
  });
}

function rollBackDialog(app, service) {
  let previous = null;
  let isFirst = true;
  const shown = read(service);
  confirmDialog({
    title: `Roll back ${service.name}`,
    verb: "Roll back",
    isDanger: true,
    lines: () => ["The service returns to the spec before its last update. Tasks are replaced one after the other or as its rollback configuration says."],
    act: () => changeService(service.id, (spec) => spec, { query: "&rollback=previous", shown, part: (found) => [found.Spec, found.PreviousSpec] }),
    more: (redraw) => {
      if (isFirst) {
        isFirst = false;
        void shown.then((found) => {
          previous = found;
          redraw();
        });
      }
      return previous?.PreviousSpec ? h("ul", { class: "plain changes" }, changesOf(previous.Spec, previous.PreviousSpec)) : null;
    },
  });
}

/** The differences between two specs, by path.  Environment variables, labels and long values are not shown. */
function changesOf(from, to) {
  const found = [];
  const walk = (a, b, path) => {
    if (found.length > 12 || JSON.stringify(a) === JSON.stringify(b)) return;
    const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
    if (isObject(a) && isObject(b)) {
      for (const key of new Set([...Object.keys(a), ...Object.keys(b)])) walk(a[key], b[key], [...path, key]);
    } else found.push({ path, a, b });
  };
  walk(from, to, []);
  return found.map(({ path, a, b }) => {
    const isPlain = (value) => value === undefined || ["string", "number", "boolean"].includes(typeof value);
    const isShown = isPlain(a) && isPlain(b) && !path.includes("Env") && !path.includes("Labels");
    const words = isShown ? [h("code", {}, imageName(a ?? "none")), " → ", h("code", {}, imageName(b ?? "none"))] : "changes";
    return h("li", { key: path.join(".") }, `${path.filter((name) => !["TaskTemplate", "ContainerSpec", "Mode"].includes(name)).join(" ")}: `, words);
  });
}

function simpleDialog(_app, { title, verb, lines, path }) {
  confirmDialog({ title, verb, lines: () => lines, act: () => post(path) });
}

// --- nodes

async function changeNode(id, change) {
  const node = await get(`nodes/${id}`);
  await post(`nodes/${id}/update?version=${node.Version.Index}`, { ...node.Spec, ...change });
}

function nodeDialog(_app, node, { title, verb, lines, change, isDanger = false }) {
  confirmDialog({ title, verb, isDanger, lines: () => lines, act: () => changeNode(node.id, change) });
}

function drainDialog(app, node) {
  const groups = new Map();
  for (const task of app.cluster.tasksOf("node", node.id)) {
    const service = app.cluster.get("services", task.service);
    if (!service || !isCounted(task)) continue;
    const group = groups.get(service.id) ?? { service, count: 0 };
    group.count += 1;
    groups.set(service.id, group);
  }
  const { move, end } = whenDrained([...groups.values()]);
  const others = app.cluster.all("nodes").filter((other) => other.id !== node.id && other.state === "ready" && other.availability === "active").length;
  nodeDialog(app, node, {
    title: `Drain ${node.name}`,
    verb: "Drain",
    isDanger: true,
    change: { Availability: "drain" },
    lines: [
      move.length > 0 ? `Tasks stop here and start on ${others === 1 ? "the other node" : `the other ${count(others, "node")}`}: ${move.join(", ")}.` : "No task moves to another node.",
      end.length > 0 && `Tasks of global services end: ${end.join(", ")}.`,
      others === 0 && "No other node accepts tasks, so they stay pending.",
    ].filter(Boolean),
  });
}

function roleDialog(app, node, role) {
  const change = role === "manager" ? 1 : -1;
  const { managers, survives, warning } = quorumAfter(app.cluster.info.managers, change, role === "manager" || node.manager === "reachable");
  const verb = role === "manager" ? "Promote" : "Demote";
  confirmDialog({
    title: `${verb} ${node.name}`,
    verb,
    isDanger: role === "worker",
    canAct: () => managers >= 1,
    lines: () => [`The cluster will have ${count(managers, "manager")} and survive the loss of ${survives}.`, ...(warning ? [warning] : [])],
    act: () => changeNode(node.id, { Role: role }),
  });
}
