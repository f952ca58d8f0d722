/** Places of nodes and tasks in the honeycomb.  Lengths in CSS pixels.  No DOM here. */

const ROOT3 = Math.sqrt(3);
/** How much of a node's hexagon its cells fill. Below them is room for the name, above them for the load. */
const FILLED = 0.67;
const RADIUS_MAX = 150;

/** Corners of a hexagon of radius 1: of a node it lies on a side, of a task it stands on a corner. */
export const FLAT = corners(0);
export const POINTED = corners(30);

function corners(turn) {
  return Array.from({ length: 6 }, (_, i) => {
    const angle = ((60 * i + turn) * Math.PI) / 180;
    return { x: Math.cos(angle), y: Math.sin(angle) };
  });
}

/**
 * The comb of `count` nodes that is largest in a room of `width` by `height`:
 * `{radius, places: [{x, y}]}`, row by row, centred.
 */
export function comb(count, width, height) {
  if (count === 0 || width <= 0 || height <= 0) return { radius: 0, places: [] };
  let best = { radius: 0, columns: 1 };
  for (let columns = 1; columns <= count; columns += 1) {
    const rows = Math.ceil(count / columns);
    const across = 1.5 * (columns - 1) + 2;
    const down = (rows + (columns > 1 ? 0.5 : 0)) * ROOT3;
    const radius = Math.min(width / across, height / down, RADIUS_MAX);
    // Of two that are equally large the one with more rows: a comb, not a chain.
    if (radius > best.radius * 1.02) best = { radius, columns };
  }
  const { radius, columns } = best;
  const places = Array.from({ length: count }, (_, i) => {
    const column = i % columns;
    return {
      x: 1.5 * radius * column,
      y: ROOT3 * radius * (Math.floor(i / columns) + (column % 2) / 2),
    };
  });
  const box = bounds(places, radius);
  const dx = width / 2 - (box.left + box.right) / 2;
  const dy = height / 2 - (box.top + box.bottom) / 2;
  return { radius, places: places.map(({ x, y }) => ({ x: x + dx, y: y + dy })) };
}

function bounds(places, radius) {
  let [left, right, top, bottom] = [Infinity, -Infinity, Infinity, -Infinity];
  for (const { x, y } of places) {
    left = Math.min(left, x - radius);
    right = Math.max(right, x + radius);
    top = Math.min(top, y - (radius * ROOT3) / 2);
    bottom = Math.max(bottom, y + (radius * ROOT3) / 2);
  }
  return { left, right, top, bottom };
}

/** How many rings around the middle cell hold `count` cells. */
export function rings(count) {
  let ring = 0;
  while (cellsOf(ring) < count) ring += 1;
  return ring;
}

/** How many cells there are within `ring` rings. */
export function cellsOf(ring) {
  return 1 + 3 * ring * (ring + 1);
}

const AROUND = [
  [1, 0],
  [0, 1],
  [-1, 1],
  [-1, 0],
  [0, -1],
  [1, -1],
];
const spiral = [{ q: 0, r: 0 }];

/** The axial place of the cell `index`, in a spiral from the middle. */
export function cell(index) {
  while (spiral.length <= index) {
    const ring = rings(spiral.length + 1);
    let q = 0;
    let r = -ring;
    for (let side = 0; side < 6; side += 1) {
      for (let step = 0; step < ring; step += 1) {
        spiral.push({ q, r });
        q += AROUND[side][0];
        r += AROUND[side][1];
      }
    }
  }
  return spiral[index];
}

/** The radius of a cell in a node of `radius` with `ring` rings. */
export function cellRadius(radius, ring) {
  return (FILLED * radius * 2) / (ROOT3 * (2 * ring + 1));
}

/** The middle of cell `index`, from the middle of its node, for cells of radius `size`. */
export function cellPlace(index, size) {
  const { q, r } = cell(index);
  return { x: size * ROOT3 * (q + r / 2), y: size * 1.5 * r };
}

/** Rings that most nodes need: the fullest tenth makes its own cells smaller instead of everybody's. */
export function commonRings(counts) {
  if (counts.length === 0) return 1;
  const sorted = [...counts].sort((a, b) => a - b);
  return Math.max(1, rings(sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * 0.9))]));
}

/** Whether a point (from the middle) is within a flat hexagon of `radius`. */
export function isInside(x, y, radius) {
  const dx = Math.abs(x);
  const dy = Math.abs(y);
  return dy <= (ROOT3 / 2) * radius && ROOT3 * dx + dy <= ROOT3 * radius;
}

/** Gives each task a cell of its node that it keeps: `{task id: index}` before and after. */
export function seat(before, ids) {
  const after = new Map();
  const used = new Set();
  for (const id of ids) {
    const index = before.get(id);
    if (index !== undefined) {
      after.set(id, index);
      used.add(index);
    }
  }
  // A comb that has lost most of its tasks is filled anew, or few tasks would sit in the outer rings.
  const highest = Math.max(-1, ...used);
  if (rings(highest + 1) > rings(ids.length) + 1) return new Map(ids.map((id, index) => [id, index]));
  let next = 0;
  for (const id of ids) {
    if (after.has(id)) continue;
    while (used.has(next)) next += 1;
    used.add(next);
    after.set(id, next);
  }
  return after;
}
