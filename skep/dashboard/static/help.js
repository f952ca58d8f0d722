/** The keys. */

import { h } from "./dom.js";
import { dialogHead, openDialog } from "./dialogs.js";

const KEYS = [
  ["Everywhere", [["/", "search"], ["g h", "hive"], ["g s", "services"], ["g n", "nodes"], ["g t", "tasks"], ["g w", "networks"], ["g k", "stacks"], ["g v", "volumes"], ["g c", "secrets and configs"], ["g e", "events"], ["d", "light, dark, or as the system"], ["Esc", "close what is open"], ["?", "these keys"]]],
  ["In the hive", [["← → ↑ ↓", "from node to node"], ["Enter", "open the node"], ["+ −", "zoom; 0 shows everything"], ["t", "the same as a table"]]],
  ["In lists", [["j k", "next and previous row"], ["Enter", "open it"]]],
];

export function showHelp() {
  openDialog("Keys", "help", (_redraw, close) => [
    dialogHead("Keys", close),
    h("div", { class: "keys" }, KEYS.map(([title, keys]) =>
      h("section", {}, h("h3", {}, title), h("dl", {}, keys.flatMap(([key, text]) => [h("dt", {}, key.split(" ").map((one) => h("kbd", {}, one))), h("dd", {}, text)]))))),
    h("p", { class: "quiet small" }, "In the hive a full cell runs, one with a core starts, an empty one waits, a crossed one has failed. The border of a node fills with its load."),
  ]);
}
