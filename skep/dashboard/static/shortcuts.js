/** The keyboard shortcuts. */

import { h } from "./dom.js";
import { dialogHead, openDialog } from "./dialogs.js";

const KEYS = [
  ["Everywhere", [["/", "search"], ["g h", "hive"], ["g s", "services"], ["g n", "nodes"], ["g t", "tasks"], ["g w", "networks"], ["g r", "routes"], ["g k", "stacks"], ["g v", "volumes"], ["g c", "secrets and configs"], ["g e", "events"], ["d", "theme: automatic, light, dark"], ["Esc", "close the panel or dialog"], ["?", "show these keys"]]],
  ["In the hive", [["← → ↑ ↓", "move from node to node"], ["Enter", "open the node"], ["+ −", "zoom"], ["0", "show everything"], ["t", "map or table"]]],
  ["In lists", [["j k", "next and previous row"], ["Enter", "open it"]]],
];

export function showHelp() {
  openDialog("Keys", "help", (_redraw, close) => [
    dialogHead("Keys", close),
    h("div", { class: "keys" }, KEYS.map(([title, keys]) =>
      h("section", {}, h("h3", {}, title), h("dl", {}, keys.flatMap(([key, text]) => [h("dt", {}, key.split(" ").map((one) => h("kbd", {}, one))), h("dd", {}, text)]))))),
  ]);
}
