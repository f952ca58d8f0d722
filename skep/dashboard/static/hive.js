/** The hive: nodes as hexagons with their tasks as cells.  A canvas for still shapes, and one above it for moving ones. */

import { Scenes, at } from "./scene.js";
import { Painter } from "./paint.js";
import { age, count, imageName, percent } from "./text.js";
import { availabilityText, phase } from "./cluster.js";
import { h, patch } from "./dom.js";

const MOVE_MS = 650;
const GROW_MS = 260;
const ZOOM_MAX = 12;
const SHARP_AT_ONCE = 1500;
const SHARP_AFTER_MS = 140;
const INKS = ["ground", "surface", "edge", "text", "muted", "accent", "bad", "gauge", "run", "on-cell"];

const isInPlace = (node, before) => before !== undefined && before.x === node.x && before.y === node.y && before.radius === node.radius;

const ease = (t) => (t < 0.5 ? 4 * t ** 3 : 1 - (-2 * t + 2) ** 3 / 2);

/** Draws into `element`, and calls `open(kind, id)` for a chosen node or task. */
export class Hive {
  element = document.createElement("div");
  #still = document.createElement("canvas");
  #moving = document.createElement("canvas");
  #tip = document.createElement("div");
  /** The cluster that is drawn. */
  cluster;
  #open;
  #scenes = new Scenes();
  #scene = null;
  #painter = null;
  /** The drawn nodes, or null if everything has to be drawn, and the nodes to draw again. */
  #drawn = null;
  #due = new Set();
  #moves = [];
  #view = { scale: 1, x: 0, y: 0 };
  /** The view of the still canvas. */
  #painted = { scale: 1, x: 0, y: 0 };
  #sharpen = 0;
  #pointed = { node: null, cell: null };
  #focused = -1;
  #highlight = null;
  #selected = null;
  #frame = 0;
  #calm = matchMedia("(prefers-reduced-motion: reduce)");
  /** Number of drawn frames, for tests of speed. */
  frames = 0;

  constructor(cluster, open) {
    this.cluster = cluster;
    this.#open = open;
    this.element.className = "comb";
    this.element.tabIndex = 0;
    this.element.setAttribute("role", "application");
    this.element.setAttribute("aria-roledescription", "map of the cluster");
    this.#tip.className = "tip";
    this.#tip.hidden = true;
    this.#tip.setAttribute("role", "status");
    this.#moving.className = "moving";
    this.element.append(this.#still, this.#moving, this.#tip);
    new ResizeObserver(() => this.#resize()).observe(this.element);
    this.#listen();
  }

  /** Draws the present state of the cluster. */
  update() {
    const { clientWidth: width, clientHeight: height } = this.element;
    if (!width || !height || this.#painter === null) return;
    this.#fitCanvases();
    const now = performance.now();
    const scene = this.#scenes.build(this.cluster, width, height);
    this.#scene = scene;
    if (!this.#calm.matches) {
      for (const move of scene.moves) {
        this.#moves.push({ ...move, since: now, until: now + (move.from ? MOVE_MS : GROW_MS) });
        if (move.cell) this.#due.add(move.cell.node);
      }
    }
    this.element.setAttribute("aria-label", this.#summary());
    // The first frame shows the hive at once, as the next one may be a tenth of a second away.
    if (this.frames === 0) this.#draw(now);
    else this.#ask();
  }

  /** Dims the tasks of all services except one, or of none for null. */
  highlight(service) {
    if (this.#highlight === service) return;
    this.#highlight = service;
    this.#redraw();
  }

  /** Draws a ring around the object in the panel, `{kind, id}` or null. */
  select(selected) {
    if (this.#selected?.id === selected?.id) return;
    this.#selected = selected;
    this.#ask();
  }

  /** Reads the colors of the page's theme. */
  theme() {
    const style = getComputedStyle(document.documentElement);
    const ink = Object.fromEntries(INKS.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
    ink.onCell = ink["on-cell"];
    ink.font = style.getPropertyValue("--font").trim();
    this.#painter = new Painter(ink, {
      // Without its stack, as a cell has room for one word.
      name: (service) => {
        const row = this.cluster.get("services", service);
        return row?.stack && row.name.startsWith(`${row.stack}_`) ? row.name.slice(row.stack.length + 1) : (row?.name ?? "");
      },
      slotOf: (task) => this.cluster.slotOf(task),
      isDimmed: (task) => this.#highlight !== null && task.service !== this.#highlight,
    });
    this.#redraw();
  }

  fit() {
    this.#move(1, 0, 0);
    this.#redraw();
  }

  /** Zooms by a factor around the middle or a point of the element. */
  zoom(factor, x = this.element.clientWidth / 2, y = this.element.clientHeight / 2) {
    const scale = Math.min(ZOOM_MAX, Math.max(1, this.#view.scale * factor));
    const ratio = scale / this.#view.scale;
    this.#move(scale, x - (x - this.#view.x) * ratio, y - (y - this.#view.y) * ratio);
  }

  #move(scale, x, y) {
    const { clientWidth: width, clientHeight: height } = this.element;
    // The hive always fills the element.
    this.element.classList.toggle("zoomed", scale > 1);
    this.#view = {
      scale,
      x: Math.min(0, Math.max(width - width * scale, x)),
      y: Math.min(0, Math.max(height - height * scale, y)),
    };
    if (this.#scene === null || this.#scene.cells.size < SHARP_AT_ONCE) return this.#redraw();
    // With many cells the old picture is moved and scaled, and drawn again when the pointer rests.
    const ratio = scale / this.#painted.scale;
    this.#still.style.transform = `translate(${this.#view.x - this.#painted.x * ratio}px, ${this.#view.y - this.#painted.y * ratio}px) scale(${ratio})`;
    clearTimeout(this.#sharpen);
    this.#sharpen = setTimeout(() => this.#redraw(), SHARP_AFTER_MS);
    return this.#ask();
  }

  #redraw() {
    this.#drawn = null;
    this.#ask();
  }

  #ask() {
    if (this.#frame === 0) this.#frame = requestAnimationFrame((now) => this.#draw(now));
  }

  #resize() {
    if (this.#fitCanvases()) this.update();
  }

  /** Fits the canvases to the element, and returns whether their size changed. */
  #fitCanvases() {
    const ratio = Math.min(2, devicePixelRatio);
    const width = Math.round(this.element.clientWidth * ratio);
    const height = Math.round(this.element.clientHeight * ratio);
    if (this.#still.width === width && this.#still.height === height) return false;
    for (const canvas of [this.#still, this.#moving]) Object.assign(canvas, { width, height });
    this.#drawn = null;
    this.#moves = [];
    const { scale, x, y } = this.#view;
    this.#move(scale, x, y);
    return true;
  }

  #context(canvas, { scale, x, y }) {
    const context = canvas.getContext("2d");
    const ratio = canvas.width / Math.max(1, this.element.clientWidth);
    context.setTransform(ratio * scale, 0, 0, ratio * scale, ratio * x, ratio * y);
    return context;
  }

  #draw(now) {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    if (this.#scene === null || this.#painter === null || !this.element.isConnected) return;
    this.frames += 1;
    const ended = this.#moves.filter((move) => move.until <= now || !this.#isThere(move));
    this.#moves = this.#moves.filter((move) => !ended.includes(move));
    for (const { cell } of ended) if (cell) this.#due.add(cell.node);
    const without = new Set(this.#moves.map((move) => (move.cell ?? move.gone).task.id));
    this.#drawStill(without);
    this.#drawMoving(now);
    if (this.#moves.length > 0) this.#ask();
  }

  #isThere(move) {
    return move.gone !== undefined || this.#scene.cells.has(move.cell.task.id);
  }

  #drawStill(without) {
    if (this.#drawn === null) {
      this.#painted = this.#view;
      this.#still.style.transform = "";
      clearTimeout(this.#sharpen);
    }
    const { scale } = this.#painted;
    const context = this.#context(this.#still, this.#painted);
    const { nodes } = this.#scene;
    const before = this.#drawn;
    this.#drawn = new Map(nodes.map((node) => [node.row.id, node]));
    const isAll = before === null || before.size !== nodes.length || nodes.some((node) => !isInPlace(node, before.get(node.row.id)));
    if (isAll) {
      context.save();
      context.setTransform(1, 0, 0, 1, 0, 0);
      context.clearRect(0, 0, this.#still.width, this.#still.height);
      context.restore();
      this.#painter.nodes(context, nodes.filter((node) => this.#isInSight(node)), { scale, without });
    } else {
      const due = nodes.filter((node) => (before.get(node.row.id) !== node || this.#due.has(node.row.id)) && this.#isInSight(node));
      for (const node of due) this.#painter.clear(context, node);
      this.#painter.nodes(context, due, { scale, without });
    }
    this.#due.clear();
  }

  #isInSight({ x, y, radius }) {
    const { scale, x: dx, y: dy } = this.#painted;
    const [px, py, reach] = [x * scale + dx, y * scale + dy, radius * scale];
    return px + reach > 0 && py + reach > 0 && px - reach < this.element.clientWidth && py - reach < this.element.clientHeight;
  }

  #drawMoving(now) {
    const context = this.#context(this.#moving, this.#view);
    const { scale } = this.#view;
    context.save();
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.#moving.width, this.#moving.height);
    context.restore();
    const moving = new Set(this.#moves.map((move) => move.cell?.task.id));
    const waiting = this.#scene.waiting.filter((cell) => !moving.has(cell.task.id));
    if (this.#scene.waiting.length > 0) {
      this.#painter.label(context, `${this.#scene.waiting.length} pending`, 24, this.#scene.height - 26);
      this.#painter.cells(context, waiting, scale);
    }
    for (const move of this.#moves) this.#drawMove(context, move, (now - move.since) / (move.until - move.since));
    this.#painter.rings(context, this.#siblings(), scale);
    for (const shape of this.#marked()) this.#painter.ring(context, shape, shape.isNode, scale);
  }

  #drawMove(context, { cell, gone, from }, part) {
    const t = ease(Math.min(1, Math.max(0, part)));
    const { scale } = this.#view;
    if (gone) return this.#painter.cells(context, [gone], scale, 1 - t);
    const now = this.#scene.cells.get(cell.task.id) ?? cell;
    if (!from) return this.#painter.cells(context, [now], scale, t);
    // A bee does not fly in a straight line.
    const lift = Math.sin(Math.PI * t) * Math.min(40, Math.hypot(now.x - from.x, now.y - from.y) / 5);
    const place = {
      ...now,
      x: from.x + (now.x - from.x) * t,
      y: from.y + (now.y - from.y) * t - lift,
      size: from.size + (now.size - from.size) * t,
    };
    return this.#painter.cells(context, [place], scale, 1 + 0.25 * Math.sin(Math.PI * t));
  }

  /** Cells of the same service as the one below the pointer. */
  #siblings() {
    const { cell } = this.#pointed;
    if (cell === null) return [];
    const { service } = cell.task;
    return [...this.#scene.cells.values()].filter(({ task }) => task.service === service && task.id !== cell.task.id);
  }

  #marked() {
    const marks = [];
    const node = (found) => found && marks.push({ x: found.x, y: found.y, size: found.radius, isNode: true });
    const { cell, node: pointed } = this.#pointed;
    if (cell) marks.push(this.#scene.cells.get(cell.task.id) ?? cell);
    else node(pointed);
    if (this.#selected?.kind === "tasks") {
      const selected = this.#scene.cells.get(this.#selected.id);
      if (selected) marks.push(selected);
    }
    if (this.#selected?.kind === "nodes") node(this.#scene.nodes.find(({ row }) => row.id === this.#selected.id));
    if (this.#focused >= 0 && this.element.matches(":focus-visible")) node(this.#scene.nodes[this.#focused]);
    return marks;
  }

  #summary() {
    const nodes = this.#scene.nodes.length;
    const down = this.#scene.nodes.filter(({ row }) => row.state !== "ready").length;
    const failed = [...this.#scene.cells.values()].filter((cell) => cell.phase === "failed").length;
    return (
      `Map of ${count(nodes, "node")} with ${count(this.#scene.cells.size, "task")}` +
      `${down ? `, ${count(down, "node")} not ready` : ""}${failed ? `, ${count(failed, "task")} failed` : ""}.` +
      " Arrow keys move from node to node, Enter opens one. Press T for a table."
    );
  }

  #listen() {
    const { element } = this;
    let grabbed = null;
    const fingers = new Map();
    let spread = 0;
    element.addEventListener("pointermove", (event) => {
      const { offsetX: x, offsetY: y } = this.#offset(event);
      if (fingers.has(event.pointerId)) fingers.set(event.pointerId, { x, y });
      if (fingers.size === 2) {
        const [a, b] = fingers.values();
        const now = Math.hypot(a.x - b.x, a.y - b.y);
        if (spread > 0) this.zoom(now / spread, (a.x + b.x) / 2, (a.y + b.y) / 2);
        spread = now;
      } else if (grabbed) {
        if (Math.hypot(x - grabbed.x, y - grabbed.y) > 4) grabbed.moved = true;
        if (grabbed.moved) this.#move(this.#view.scale, grabbed.vx + x - grabbed.x, grabbed.vy + y - grabbed.y);
      } else this.#point(x, y);
    });
    element.addEventListener("pointerdown", (event) => {
      const { offsetX: x, offsetY: y } = this.#offset(event);
      fingers.set(event.pointerId, { x, y });
      spread = 0;
      grabbed = { x, y, vx: this.#view.x, vy: this.#view.y, moved: false };
    });
    const release = (event) => {
      fingers.delete(event.pointerId);
      if (fingers.size > 0) return;
      if (event.type === "pointerup" && grabbed && !grabbed.moved) {
        const { cell, node } = this.#find(grabbed.x, grabbed.y);
        if (cell) this.#open("tasks", cell.task.id);
        else if (node) this.#open("nodes", node.row.id);
      }
      grabbed = null;
    };
    for (const type of ["pointerup", "pointercancel"]) element.addEventListener(type, release);
    element.addEventListener("pointerleave", (event) => {
      release(event);
      this.#show({ node: null, cell: null }, 0, 0);
    });
    element.addEventListener("wheel", (event) => {
      event.preventDefault();
      const { offsetX: x, offsetY: y } = this.#offset(event);
      this.zoom(Math.exp(-event.deltaY / 400), x, y);
    }, { passive: false });
    element.addEventListener("dblclick", (event) => {
      const { offsetX: x, offsetY: y } = this.#offset(event);
      if (this.#view.scale > 1) this.fit();
      else this.zoom(3, x, y);
    });
    element.addEventListener("keydown", (event) => this.#key(event));
    element.addEventListener("focus", () => this.#ask());
    element.addEventListener("blur", () => this.#ask());
  }

  /** The place of an event in the element.  Its own offset is relative to the child below the pointer. */
  #offset(event) {
    const box = this.element.getBoundingClientRect();
    return { offsetX: event.clientX - box.left, offsetY: event.clientY - box.top };
  }

  #find(x, y) {
    if (this.#scene === null) return { node: null, cell: null };
    const { scale, x: dx, y: dy } = this.#view;
    return at(this.#scene, (x - dx) / scale, (y - dy) / scale);
  }

  #point(x, y) {
    this.#show(this.#find(x, y), x, y);
  }

  #show(found, x, y) {
    const isSame = found.cell?.task.id === this.#pointed.cell?.task.id && found.node?.row.id === this.#pointed.node?.row.id;
    this.#pointed = found;
    this.#tip.hidden = !found.cell && !found.node;
    if (!this.#tip.hidden) {
      if (!isSame) patch(this.#tip, ...this.#tipOf(found));
      const { clientWidth: width, clientHeight: height } = this.element;
      this.#tip.style.left = `${Math.min(x + 14, width - this.#tip.offsetWidth - 8)}px`;
      this.#tip.style.top = `${y + 18 + this.#tip.offsetHeight > height ? y - this.#tip.offsetHeight - 10 : y + 18}px`;
    }
    if (!isSame) this.#ask();
  }

  #tipOf({ cell, node }) {
    if (cell) {
      const { task } = cell;
      return [
        h("b", {}, this.cluster.taskName(task)),
        h("span", {}, `${phase(task)} for ${age(task.since, Date.now())}${cell.node ? ` on ${this.cluster.name("nodes", cell.node)}` : ""}`),
        h("span", { class: "mono" }, imageName(task.image)),
        task.error && h("span", { class: "bad" }, task.error),
      ];
    }
    const { row } = node;
    return [
      h("b", {}, row.name),
      h("span", {}, `${row.role}${row.leader ? ", leader" : ""} · ${row.state}${row.availability === "active" ? "" : `, ${availabilityText(row)}`}`),
      h("span", {}, `${count(node.cells.length, "task")}${row.load === null ? "" : `, load ${percent(row.load)}`}`),
      row.reason && h("span", { class: "bad" }, row.reason),
    ];
  }

  #key(event) {
    const nodes = this.#scene?.nodes ?? [];
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key in steps && nodes.length > 0) this.#step(...steps[event.key]);
    else if (event.key === "Enter" && this.#focused >= 0) this.#open("nodes", nodes[this.#focused].row.id);
    else if (event.key === "+" || event.key === "=") this.zoom(1.4);
    else if (event.key === "-") this.zoom(1 / 1.4);
    else if (event.key === "0") this.fit();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  /** Moves the focus to the nearest node in a direction. */
  #step(dx, dy) {
    const { nodes } = this.#scene;
    const here = nodes[this.#focused];
    let best = here ? this.#focused : 0;
    let least = Infinity;
    nodes.forEach((node, i) => {
      if (!here || i === this.#focused) return;
      const along = (node.x - here.x) * dx + (node.y - here.y) * dy;
      const aside = Math.abs((node.x - here.x) * dy) + Math.abs((node.y - here.y) * dx);
      if (along > 1 && along + 2 * aside < least) [best, least] = [i, along + 2 * aside];
    });
    this.#focused = best;
    const node = nodes[best];
    const { scale, x, y } = this.#view;
    this.#show({ node, cell: null }, node.x * scale + x, node.y * scale + y);
  }
}
