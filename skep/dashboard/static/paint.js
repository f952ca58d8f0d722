/** Draws scenes of the hive on a canvas.  Cells of one look are one path: ten thousand of them are a few dozen fills. */

import { FLAT, POINTED, cellPlace, cellsOf } from "./honeycomb.js";
import { short } from "./text.js";

const HALF_ROOT3 = Math.sqrt(3) / 2;
const NODE_FILL = 0.965;
const CELL_FILL = 0.9;
/** Cells smaller than this many pixels are squares, empty ones smaller than the second are left out, numbers and names below the next two. */
const SQUARE_BELOW = 1.6;
const EMPTY_FROM = 4;
const NUMBER_FROM = 11;
const LABEL_FROM = 26;
const NAME_FROM = 30;
const ELLIPSIS_WIDTH = 6.3;

function trace(context, corners, x, y, radius) {
  context.moveTo(x + corners[0].x * radius, y + corners[0].y * radius);
  for (let i = 1; i < 6; i += 1) context.lineTo(x + corners[i].x * radius, y + corners[i].y * radius);
  context.closePath();
}

/** Shapes collected by their look, drawn at once. */
class Batches {
  #batches = new Map();

  add(look, x, y, radius) {
    const batch = this.#batches.get(look.key);
    if (batch) batch.at.push(x, y, radius);
    else this.#batches.set(look.key, { look, at: [x, y, radius] });
  }

  draw(context, scale) {
    for (const { look, at } of this.#batches.values()) {
      context.globalAlpha = look.alpha;
      context.beginPath();
      for (let i = 0; i < at.length; i += 3) look.shape(context, at[i], at[i + 1], at[i + 2], scale);
      if (look.fill) {
        context.fillStyle = look.fill;
        context.fill();
      } else {
        context.strokeStyle = look.stroke;
        context.lineWidth = look.width / scale;
        context.stroke();
      }
    }
    context.globalAlpha = 1;
  }
}

/** A task's cell.  Written out: of the first picture of ten thousand cells, a loop over corners takes the most time. */
function hexagon(context, x, y, radius, scale) {
  if (radius * scale < SQUARE_BELOW) return context.rect(x - radius * 0.85, y - radius * 0.85, radius * 1.7, radius * 1.7);
  const across = radius * HALF_ROOT3;
  const down = radius / 2;
  context.moveTo(x + across, y + down);
  context.lineTo(x, y + radius);
  context.lineTo(x - across, y + down);
  context.lineTo(x - across, y - down);
  context.lineTo(x, y - radius);
  context.lineTo(x + across, y - down);
  return context.closePath();
}

const cross = (context, x, y, radius) => {
  const reach = radius * 0.42;
  context.moveTo(x - reach, y - reach);
  context.lineTo(x + reach, y + reach);
  context.moveTo(x + reach, y - reach);
  context.lineTo(x - reach, y + reach);
};

const bar = (context, x, y, radius) => {
  context.moveTo(x - radius * 0.45, y);
  context.lineTo(x + radius * 0.45, y);
};

/** How each phase looks: by shape and by brightness, so that it can be read without colours. */
function looksOf(phase, colour, ink, alpha) {
  const fill = (scale, strength = 1) => ({ shape: hexagon, fill: colour, alpha: alpha * strength, scale });
  const line = (shape, stroke, width = 1.5, scale = 0.92) => ({ shape, stroke, width, alpha, scale });
  switch (phase) {
    case "running":
      return [fill(1)];
    case "starting":
      return [fill(1, 0.28), fill(0.55)];
    case "waiting":
      return [line(hexagon, colour)];
    case "unhealthy":
      return [fill(1), line(hexagon, ink.bad, 2.2), line(bar, ink.bad, 2.2, 1)];
    case "stopping":
      return [fill(1, 0.32)];
    case "done":
      return [fill(0.42, 0.7)];
    case "failed":
      return [fill(1, 0.14), line(hexagon, ink.bad), line(cross, ink.bad, 1.8, 1)];
    default:
      return [fill(1, 0.22), line(bar, ink.muted, 1.5, 1)];
  }
}

/** Draws with the inks of a theme; `palette` is asked for each cell: `colour(service id)`, `name(service id)`, `isDimmed(task)`. */
export class Painter {
  #ink;
  #palette;
  #looks = new Map();

  /** `ink`: the colours `{ground, surface, line, faint, text, muted, accent, bad}` and the `font`. */
  constructor(ink, palette) {
    this.#ink = ink;
    this.#palette = palette;
  }

  #looksOf(cell) {
    const colour = this.#palette.colour(cell.task.service);
    const alpha = this.#palette.isDimmed(cell.task) ? 0.12 : 1;
    const key = `${cell.phase} ${colour} ${alpha}`;
    let looks = this.#looks.get(key);
    if (!looks) {
      looks = looksOf(cell.phase, colour, this.#ink, alpha).map((look, i) => ({ ...look, key: `${i} ${key}` }));
      this.#looks.set(key, looks);
    }
    return looks;
  }

  /** Draws nodes with their cells, except the cells in `without` (they are on their way). */
  nodes(context, nodes, { scale, without }) {
    const grounds = new Batches();
    const cells = new Batches();
    const lines = new Batches();
    for (const node of nodes) {
      this.#ground(grounds, node, scale);
      for (const cell of node.cells) if (!without.has(cell.task.id)) this.#cell(cells, cell);
      lines.add(this.#border(node.row), node.x, node.y, node.radius * NODE_FILL);
    }
    grounds.draw(context, scale);
    cells.draw(context, scale);
    lines.draw(context, scale);
    for (const node of nodes) {
      this.#gauge(context, node, scale);
      if (node.radius * scale >= NAME_FROM) this.#name(context, node, scale);
      if (node.size * scale >= NUMBER_FROM) this.#numbers(context, node, without, scale);
    }
  }

  /** Clears what belongs to a node, and nothing beside it. */
  clear(context, node) {
    context.save();
    context.beginPath();
    trace(context, FLAT, node.x, node.y, node.radius);
    context.clip();
    context.clearRect(node.x - node.radius, node.y - node.radius, node.radius * 2, node.radius * 2);
    context.restore();
  }

  /** Draws cells by themselves: those that wait, those that move (`grow` of their size). */
  cells(context, cells, scale, grow = 1) {
    const batches = new Batches();
    for (const cell of cells) this.#cell(batches, cell, grow);
    batches.draw(context, scale);
  }

  /** A ring around what is pointed at or selected. */
  ring(context, { x, y, size }, isNode, scale) {
    context.beginPath();
    trace(context, isNode ? FLAT : POINTED, x, y, isNode ? size * NODE_FILL : size + 1.5 / scale);
    context.strokeStyle = this.#ink.text;
    context.lineWidth = 2 / scale;
    context.stroke();
  }

  label(context, text, x, y) {
    context.font = `12px ${this.#ink.font}`;
    context.textAlign = "left";
    context.textBaseline = "middle";
    context.fillStyle = this.#ink.muted;
    context.fillText(text, x, y);
  }

  #cell(batches, cell, grow = 1) {
    for (const look of this.#looksOf(cell)) batches.add(look, cell.x, cell.y, cell.size * CELL_FILL * look.scale * grow);
  }

  #ground(batches, node, scale) {
    const ink = this.#ink;
    const isOff = node.row.state !== "ready" || node.row.availability !== "active";
    batches.add(
      { key: `ground ${isOff}`, shape: flat, fill: isOff ? ink.ground : ink.surface, alpha: 1 },
      node.x,
      node.y,
      node.radius * NODE_FILL,
    );
    if (node.size * scale < EMPTY_FROM) return;
    const used = new Set(node.seats.values());
    const look = { key: `empty ${isOff}`, shape: hexagon, fill: ink.faint, alpha: isOff ? 0.4 : 1 };
    for (let i = 0; i < cellsOf(node.ring); i += 1) {
      if (used.has(i)) continue;
      const { x, y } = cellPlace(i, node.size);
      batches.add(look, node.x + x, node.y + y, node.size * CELL_FILL);
    }
  }

  #border(row) {
    const { line, bad, muted } = this.#ink;
    if (row.state === "down") return { key: "down", shape: flat, stroke: bad, width: 1.6, alpha: 1 };
    if (row.state !== "ready") return { key: "away", shape: dashes, stroke: bad, width: 1.4, alpha: 1 };
    if (row.availability !== "active") return { key: "off", shape: dashes, stroke: muted, width: 1.2, alpha: 1 };
    return { key: "ready", shape: flat, stroke: line, width: 1, alpha: 1 };
  }

  /** The node's load: that share of its border, clockwise from the top left corner. */
  #gauge(context, node, scale) {
    const { load } = node.row;
    if (!load || node.row.state !== "ready") return;
    const radius = node.radius * NODE_FILL;
    let left = Math.min(1, load) * 6;
    context.beginPath();
    for (let side = 0; side < 6 && left > 0; side += 1) {
      const from = FLAT[(side + 4) % 6];
      const to = FLAT[(side + 5) % 6];
      const part = Math.min(1, left);
      if (side === 0) context.moveTo(node.x + from.x * radius, node.y + from.y * radius);
      context.lineTo(
        node.x + (from.x + (to.x - from.x) * part) * radius,
        node.y + (from.y + (to.y - from.y) * part) * radius,
      );
      left -= part;
    }
    context.strokeStyle = load > 0.9 ? this.#ink.bad : load > 0.75 ? this.#ink.accent : this.#ink.gauge;
    context.lineWidth = Math.min(2.5, Math.max(1.2, (node.radius * scale) / 30)) / scale;
    context.stroke();
  }

  #name(context, node, scale) {
    const { row } = node;
    const size = Math.min(12, Math.max(9, (node.radius * scale) / 7)) / scale;
    const letters = Math.floor((node.radius * 1.02) / ((size / 11) * ELLIPSIS_WIDTH));
    const mark = row.state !== "ready" ? `${row.state}` : row.availability !== "active" ? row.availability : "";
    const y = node.y + node.radius * 0.765;
    context.font = `${row.role === "manager" ? 600 : 500} ${size}px ${this.#ink.font}`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    // In a small node the border passes behind its name: what is behind the letters is covered.
    context.strokeStyle = this.#ink.surface;
    context.lineWidth = 3 / scale;
    context.lineJoin = "round";
    const write = (text, at, colour) => {
      context.strokeText(text, node.x, at);
      context.fillStyle = colour;
      context.fillText(text, node.x, at);
    };
    write(short(row.name, letters), y, row.state === "ready" ? this.#ink.text : this.#ink.bad);
    if (mark) {
      context.font = `500 ${size}px ${this.#ink.font}`;
      write(mark, node.y - node.radius * 0.73, row.state === "ready" ? this.#ink.muted : this.#ink.bad);
    } else if (row.role === "manager") {
      this.#crown(context, node, scale);
    }
  }

  /** A manager has a small cell at the top; the leader's is full. */
  #crown(context, node, scale) {
    const radius = Math.min(5, Math.max(2.6, (node.radius * scale) / 20)) / scale;
    context.beginPath();
    trace(context, POINTED, node.x, node.y - node.radius * 0.765, radius);
    if (node.row.leader) {
      context.fillStyle = this.#ink.accent;
      context.fill();
    } else {
      context.strokeStyle = this.#ink.accent;
      context.lineWidth = 1.3 / scale;
      context.stroke();
    }
  }

  #numbers(context, node, without, scale) {
    const isNamed = node.size * scale >= LABEL_FROM;
    const letter = Math.min(11.5, node.size * scale * 0.72) / scale;
    const letters = Math.floor((node.size * 1.5) / (letter * 0.55));
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.fillStyle = this.#ink.onCell;
    for (const cell of node.cells) {
      if (without.has(cell.task.id) || (cell.phase !== "running" && cell.phase !== "stopping")) continue;
      context.globalAlpha = this.#palette.isDimmed(cell.task) ? 0.15 : 1;
      const slot = cell.task.slot ? String(cell.task.slot) : "";
      const name = isNamed ? short(this.#palette.name(cell.task.service), letters) : "";
      const apart = name && slot ? letter * 0.66 : 0;
      context.font = `600 ${letter}px ${this.#ink.font}`;
      if (name) context.fillText(name, cell.x, cell.y - apart);
      context.font = `${name ? 400 : 500} ${letter}px ${this.#ink.font}`;
      if (slot) context.fillText(slot, cell.x, cell.y + apart);
    }
    context.globalAlpha = 1;
  }
}

function flat(context, x, y, radius) {
  trace(context, FLAT, x, y, radius);
}

/** A hexagon of which only the corners are drawn. */
function dashes(context, x, y, radius) {
  for (let i = 0; i < 6; i += 1) {
    const [before, corner, after] = [FLAT[(i + 5) % 6], FLAT[i], FLAT[(i + 1) % 6]];
    const towards = (other) => [x + (corner.x + (other.x - corner.x) * 0.28) * radius, y + (corner.y + (other.y - corner.y) * 0.28) * radius];
    context.moveTo(...towards(before));
    context.lineTo(x + corner.x * radius, y + corner.y * radius);
    context.lineTo(...towards(after));
  }
}
