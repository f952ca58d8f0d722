/** Draws scenes of the hive on a canvas.  Cells of one look are one path, so ten thousand of them are a dozen fills. */

import { FLAT, POINTED } from "./honeycomb.js";
import { availabilityText } from "./cluster.js";
import { percent, short } from "./text.js";

const HALF_ROOT3 = Math.sqrt(3) / 2;
const NODE_FILL = 0.965;
const CELL_FILL = 0.9;
/** Shapes in one path: the browser's time for a path grows faster than its length. */
const PATH_MAX = 500;
/** Smaller cells are drawn as squares. */
const SQUARE_BELOW = 1.6;
/** Pixels from which a cell has room for its task's name, and a node for its own. */
const LABEL_FROM = 24;
const NAME_FROM = 30;
/** Pixels from which a node has room for the word before its load. */
const LOAD_WORD_FROM = 56;
/** From the middle of a node to its lower and upper side, as a share of its radius. */
const SIDE = HALF_ROOT3 * NODE_FILL;
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
      if (look.fill) context.fillStyle = look.fill;
      else Object.assign(context, { strokeStyle: look.stroke, lineWidth: look.width / scale });
      for (let first = 0; first < at.length; first += 3 * PATH_MAX) {
        context.beginPath();
        for (let i = first; i < Math.min(at.length, first + 3 * PATH_MAX); i += 3) look.shape(context, at[i], at[i + 1], at[i + 2], scale);
        if (look.fill) context.fill();
        else context.stroke();
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

/**
 * How each phase looks.  The color says how urgent it is, the shape says which one it is, so that it can be read
 * without colors.  `glyph()` of widgets.js has the same shapes.
 */
function looksOf(phase, ink, alpha) {
  const fill = (colour, scale = 1, strength = 1) => ({ shape: hexagon, fill: colour, alpha: alpha * strength, scale });
  const line = (shape, stroke, width = 1.6, scale = 0.9) => ({ shape, stroke, width, alpha, scale });
  switch (phase) {
    case "running":
      return [fill(ink.run)];
    case "starting":
      return [line(hexagon, ink.accent), fill(ink.accent, 0.5)];
    case "pending":
      return [line(hexagon, ink.accent)];
    case "unhealthy":
      return [line(hexagon, ink.bad, 2.2), line(bar, ink.bad, 2.2, 1)];
    case "stopping":
      return [line(hexagon, ink.gauge), fill(ink.gauge, 0.5)];
    case "completed":
      return [fill(ink.gauge, 0.5)];
    case "failed":
      return [fill(ink.bad, 1, 0.14), line(hexagon, ink.bad), line(cross, ink.bad, 1.8, 1)];
    default:
      return [line(hexagon, ink.gauge), line(bar, ink.gauge, 1.6, 1)];
  }
}

/** Draws with the inks of a theme.  `palette`: `name(service id)`, `slotOf(task)`, `isDimmed(task)`. */
export class Painter {
  #ink;
  #palette;
  #looks = new Map();

  /** `ink`: the colors `{ground, surface, edge, text, muted, accent, bad, gauge, run, onCell}` and the `font`. */
  constructor(ink, palette) {
    this.#ink = ink;
    this.#palette = palette;
  }

  #looksOf(cell) {
    const alpha = this.#palette.isDimmed(cell.task) ? 0.15 : 1;
    const key = `${cell.phase} ${alpha}`;
    let looks = this.#looks.get(key);
    if (!looks) {
      looks = looksOf(cell.phase, this.#ink, alpha).map((look, i) => ({ ...look, key: `${i} ${key}` }));
      this.#looks.set(key, looks);
    }
    return looks;
  }

  /** Draws nodes with their cells, except the cells in `without`, which are moving. */
  nodes(context, nodes, { scale, without }) {
    const grounds = new Batches();
    const cells = new Batches();
    const lines = new Batches();
    for (const node of nodes) {
      this.#ground(grounds, node);
      for (const cell of node.cells) if (!without.has(cell.task.id)) this.#cell(cells, cell);
      lines.add(this.#border(node.row), node.x, node.y, node.radius * NODE_FILL);
    }
    grounds.draw(context, scale);
    cells.draw(context, scale);
    lines.draw(context, scale);
    for (const node of nodes) {
      this.#gauge(context, node, scale);
      if (node.radius * scale >= NAME_FROM) this.#name(context, node, scale);
      if (node.size * scale >= LABEL_FROM) this.#labels(context, node, without, scale);
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

  /** Draws cells without a node: pending ones, and moving ones at `grow` of their size. */
  cells(context, cells, scale, grow = 1) {
    const batches = new Batches();
    for (const cell of cells) this.#cell(batches, cell, grow);
    batches.draw(context, scale);
  }

  /** Rings around the cells of one service. */
  rings(context, cells, scale) {
    context.beginPath();
    for (const { x, y, size } of cells) trace(context, POINTED, x, y, size);
    context.strokeStyle = this.#ink.text;
    context.lineWidth = 1.2 / scale;
    context.stroke();
  }

  /** A ring around a selected node or cell, or the one below the pointer. */
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

  #ground(batches, node) {
    const { ground, surface } = this.#ink;
    const isOff = node.row.state !== "ready" || node.row.availability !== "active";
    const look = { key: `ground ${isOff}`, shape: flat, fill: isOff ? ground : surface, alpha: 1 };
    batches.add(look, node.x, node.y, node.radius * NODE_FILL);
  }

  #border(row) {
    const { edge, bad } = this.#ink;
    if (row.state === "down") return { key: "down", shape: flat, stroke: bad, width: 2, alpha: 1 };
    if (row.state !== "ready") return { key: "away", shape: dashes, stroke: bad, width: 1.6, alpha: 1 };
    if (row.availability !== "active") return { key: "off", shape: dashes, stroke: edge, width: 1.4, alpha: 1 };
    return { key: "ready", shape: flat, stroke: edge, width: 1, alpha: 1 };
  }

  /** The node's load: that share of its border, clockwise from the top left corner. */
  #gauge(context, node, scale) {
    const { load } = node.row;
    if (!load || node.row.state !== "ready" || node.row.availability !== "active") return;
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
    context.lineWidth = Math.min(4, Math.max(2, (node.radius * scale) / 22)) / scale;
    context.stroke();
  }

  /** The name below the cells; above them the load in figures, or why the node accepts no tasks. */
  #name(context, node, scale) {
    const { row } = node;
    const size = Math.min(12, Math.max(9, (node.radius * scale) / 6.2)) / scale;
    const away = node.radius * SIDE - size * 0.9;
    const letters = Math.floor((node.radius * 1.02) / ((size / 11) * ELLIPSIS_WIDTH));
    context.textBaseline = "middle";
    context.textAlign = "center";
    const write = (text, x, y, weight, colour) => {
      context.font = `${weight} ${size}px ${this.#ink.font}`;
      context.fillStyle = colour;
      context.fillText(text, node.x + x, node.y + y);
    };
    const isReady = row.state === "ready";
    write(short(row.name, letters), 0, away, row.role === "manager" ? 600 : 500, isReady ? this.#ink.text : this.#ink.bad);
    const load = row.load === null ? "" : percent(row.load);
    const mark = !isReady ? row.state : row.availability !== "active" ? availabilityText(row) : node.radius * scale >= LOAD_WORD_FROM && load ? `load ${load}` : load;
    const crown = row.role === "manager" ? Math.min(5, Math.max(3, (node.radius * scale) / 18)) / scale : 0;
    context.font = `400 ${size}px ${this.#ink.font}`;
    const half = context.measureText(mark).width / 2;
    if (mark) write(mark, crown * 1.3, -away, 400, isReady ? this.#ink.muted : this.#ink.bad);
    if (crown) this.#crown(context, node, { scale, radius: crown, x: node.x - half - (mark ? crown * 0.6 : 0), y: node.y - away });
  }

  /** The sign of a manager, before its load; the leader's is full. */
  #crown(context, node, { scale, radius, x, y }) {
    context.beginPath();
    trace(context, POINTED, x, y, radius);
    if (node.row.leader) {
      context.fillStyle = this.#ink.accent;
      context.fill();
    } else {
      context.strokeStyle = this.#ink.accent;
      context.lineWidth = 1.4 / scale;
      context.stroke();
    }
  }

  /** Names of tasks in cells that have room for them: the service above, the slot below. */
  #labels(context, node, without, scale) {
    const letter = Math.min(11.5, node.size * scale * 0.4) / scale;
    const letters = Math.floor((node.size * 1.5) / (letter * 0.58));
    context.textAlign = "center";
    context.textBaseline = "middle";
    for (const cell of node.cells) {
      if (without.has(cell.task.id)) continue;
      context.globalAlpha = this.#palette.isDimmed(cell.task) ? 0.15 : 1;
      const isFull = cell.phase === "running";
      if (!isFull) continue;
      context.fillStyle = this.#ink.onCell;
      const slot = this.#palette.slotOf(cell.task);
      const apart = slot === null ? 0 : letter * 0.62;
      context.font = `600 ${letter}px ${this.#ink.font}`;
      context.fillText(short(this.#palette.name(cell.task.service), letters), cell.x, cell.y - apart);
      context.font = `400 ${letter}px ${this.#ink.font}`;
      if (slot !== null) context.fillText(`.${slot}`, cell.x, cell.y + apart);
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
