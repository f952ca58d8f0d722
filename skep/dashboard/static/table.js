/** Lists as tables.  Long tables hold only the visible rows. */

import { h } from "./dom.js";
import { compareNames } from "./text.js";

const ROW_HEIGHT = 34;
const WHOLE_UP_TO = 150;
const BEYOND = 12;

/** The sort order of each table: `{table: {column, down}}`. */
const sorting = new Map();

/**
 * A table.  `columns`: `{key, title, cell(row), sort(row)?, kind?: "number"|"wide"|"mono"}`, `kind: "wide"` is left out on
 * narrow screens, "roomy" and "mono" on phones; `target(row)`: `[kind, id]` that a row opens; `empty`: shown instead of a table without rows; `isSelected(row)`.
 */
export function table(app, { id, label, columns, rows, target, empty, isSelected }) {
  if (rows.length === 0) return empty;
  const sorted = inOrder(rows, columns, sorting.get(id));
  const { first, last } = windowOf(app, sorted.length);
  const shown = sorted.slice(first, last);
  return h(
    "table",
    { key: id, class: sorted.length <= WHOLE_UP_TO ? "list whole" : "list", "aria-label": label, "aria-rowcount": sorted.length + 1 },
    h("thead", {}, h("tr", {}, columns.map((column) => header(app, id, column)))),
    h(
      "tbody",
      {},
      spacer("above", first, columns.length),
      shown.map((row, i) => line(app, row, { columns, target, isSelected, index: first + i })),
      spacer("below", sorted.length - last, columns.length),
    ),
  );
}

function header(app, id, column) {
  const current = sorting.get(id);
  const isCurrent = current?.column === column.key;
  if (!column.sort) return h("th", { scope: "col", class: column.kind ?? "" }, column.title);
  const sort = () => {
    sorting.set(id, { column: column.key, down: isCurrent && !current.down });
    app.invalidate();
  };
  return h(
    "th",
    { scope: "col", class: column.kind ?? "", "aria-sort": isCurrent ? (current.down ? "descending" : "ascending") : "none" },
    h("button", { class: "sort", type: "button", onclick: sort }, column.title, isCurrent && h("i", { "aria-hidden": "true" }, current.down ? "↓" : "↑")),
  );
}

function line(app, row, { columns, target, isSelected, index }) {
  const [kind, rowId] = target(row);
  const open = (event) => {
    if (!event.target.closest("a, button")) app.open(kind, rowId);
  };
  return h(
    "tr",
    { key: row.id, class: isSelected?.(row) ? "selected" : "", onclick: open, "aria-rowindex": index + 2 },
    columns.map((column, i) => {
      const content = column.cell(row);
      // A long reason would push other rows off the screen; the panel has all of it.
      const shown = column.kind?.includes("rest") ? h("div", { class: "clamped", title: typeof content === "string" ? content : undefined }, content) : content;
      const inside = i === 0 ? h("a", { href: app.href(kind, rowId) }, typeof shown === "string" ? h("span", {}, shown) : shown) : shown;
      return h(i === 0 ? "th" : "td", { class: column.kind ?? "", scope: i === 0 ? "row" : undefined }, inside);
    }),
  );
}

function spacer(key, rows, columns) {
  if (rows === 0) return null;
  const cell = h("td", { colspan: columns, vars: { height: `${rows * ROW_HEIGHT}px` } });
  return h("tr", { key, class: "spacer", "aria-hidden": "true" }, cell);
}

/** Rows in the chosen order, or as they came. */
export function inOrder(rows, columns, sort) {
  const column = sort && columns.find(({ key }) => key === sort.column);
  if (!column) return rows;
  const by = column.sort;
  const compare = (a, b) => {
    const [x, y] = [by(a), by(b)];
    return typeof x === "string" ? compareNames(x, y) : x - y;
  };
  return [...rows].sort(sort.down ? (a, b) => compare(b, a) : compare);
}

function windowOf(app, count) {
  if (count <= WHOLE_UP_TO) return { first: 0, last: count };
  const first = Math.max(0, Math.floor(app.scrolled.top / ROW_HEIGHT) - BEYOND);
  return { first: Math.min(first, count), last: Math.min(count, first + Math.ceil(app.scrolled.height / ROW_HEIGHT) + 2 * BEYOND) };
}
