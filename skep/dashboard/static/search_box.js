/** The search dialog: `/` opens it, arrows choose, Enter opens a result. */

import { h } from "./dom.js";
import { openDialog } from "./dialogs.js";
import { search } from "./search.js";
import { short } from "./text.js";
import { serviceGlyph, taskGlyph } from "./widgets.js";

export function showSearch(app) {
  if (document.querySelector("dialog.finder")) return;
  let query = "";
  let chosen = 0;
  let found = [];
  const element = openDialog("Search", "finder", (redraw, close) => {
    found = search(app.cluster, query);
    chosen = Math.min(chosen, Math.max(0, found.length - 1));
    const go = (result) => {
      close();
      if (result) app.open(result.kind, result.id);
    };
    const key = (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (step) chosen = Math.min(found.length - 1, Math.max(0, chosen + step));
      else if (event.key === "Enter") go(found[chosen]);
      else return;
      event.preventDefault();
      redraw();
      element.querySelector("[aria-selected=true]")?.scrollIntoView({ block: "nearest" });
    };
    const type = (event) => {
      query = event.target.value;
      chosen = 0;
      redraw();
    };
    return [
      h("input", { key: "input", type: "search", placeholder: "Names, ids, images, addresses, labels, errors…", "aria-label": "Search", role: "combobox", "aria-expanded": "true", "aria-controls": "found", "aria-activedescendant": found.length ? `found-${chosen}` : undefined, autocomplete: "off", spellcheck: "false", oninput: type, onkeydown: key }),
      h("ul", { key: "found", id: "found", role: "listbox", "aria-label": "Found" }, found.map((result, i) =>
        h("li", { key: `${result.kind} ${result.id}`, id: `found-${i}`, role: "option", "aria-selected": String(i === chosen), onclick: () => go(result) },
          mark(app, result), h("b", {}, short(result.name, 60)), h("span", { class: "because" }, short(result.because, 70)), h("i", {}, result.kind.slice(0, -1))))),
      query && found.length === 0 && h("p", { key: "none", class: "note quiet" }, "No matches."),
    ];
  });
  element.querySelector("input").focus();
}

function mark(app, { kind, id }) {
  if (kind === "services") return serviceGlyph(app.cluster.get(kind, id));
  const task = kind === "tasks" && app.cluster.get("tasks", id);
  return task ? taskGlyph(task) : null;
}
