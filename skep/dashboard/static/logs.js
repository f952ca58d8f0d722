/** Live logs of a service or a task, followed while the panel shows them. */

import { stream } from "./api.js";
import { phase } from "./cluster.js";
import { followLog, parsedLine } from "./log_frames.js";
import { clean, clockTime } from "./text.js";

const LINES_MAX = 2000;
const NEAR_END_PX = 40;

/** Follows the logs in the panel, and none without them, as a browser has only six connections. */
export function logsOfPanel(app) {
  const { kind, id, tab } = app.route;
  app.logs.follow(tab === "logs" && app.past === null && app.cluster.cursor !== "" ? `${kind}/${id}` : "");
}

export class Logs {
  element = document.createElement("div");
  #list = document.createElement("div");
  #state = document.createElement("p");
  #filter = document.createElement("input");
  #app;
  #path = "";
  #abort = null;
  #waiting = [];
  #frame = 0;

  constructor(app) {
    this.#app = app;
    this.element.className = "logs";
    this.#list.className = "lines";
    this.#list.setAttribute("role", "log");
    this.#list.setAttribute("aria-label", "Log");
    this.#list.tabIndex = 0;
    this.#state.className = "note quiet";
    this.#filter.type = "search";
    this.#filter.placeholder = "Filter lines";
    this.#filter.setAttribute("aria-label", "Filter lines");
    this.#filter.addEventListener("input", () => {
      for (const line of this.#list.children) line.hidden = !this.#fits(line);
    });
    this.element.append(this.#filter, this.#list, this.#state);
  }

  /** Follows `services/ID` or `tasks/ID`, or stops for "". */
  follow(path) {
    if (path === this.#path) return;
    this.#abort?.abort();
    this.#path = path;
    this.#waiting = [];
    this.#list.replaceChildren();
    if (path === "") return;
    this.#abort = new AbortController();
    void this.#read(path, this.#abort.signal);
  }

  #read(path, signal) {
    const [kind, id] = path.split("/");
    return followLog(stream, path, signal, {
      take: (lines) => {
        this.#waiting.push(...lines);
        if (this.#waiting.length > LINES_MAX) this.#waiting.splice(0, this.#waiting.length - LINES_MAX);
        if (this.#frame === 0) this.#frame = requestAnimationFrame(() => this.#show());
      },
      say: (state) => {
        if (!signal.aborted) this.#state.textContent = clean(state);
      },
      isOver: () => {
        const row = this.#app.cluster.get(kind, id);
        return !row || (kind === "tasks" && ["failed", "completed"].includes(phase(row)));
      },
    });
  }

  #show() {
    this.#frame = 0;
    const list = this.#list;
    const isAtEnd = list.scrollHeight - list.scrollTop - list.clientHeight < NEAR_END_PX;
    const lines = this.#waiting.splice(0).map((line) => this.#line(line));
    list.append(...lines);
    while (list.childElementCount > LINES_MAX) list.firstElementChild.remove();
    if (isAtEnd) list.scrollTop = list.scrollHeight;
  }

  #line({ stream: from, text }) {
    const { at, task, text: said } = parsedLine(text);
    const line = document.createElement("div");
    line.className = from;
    const add = (tag, content) => {
      const part = document.createElement(tag);
      part.textContent = clean(content);
      line.append(part);
      return part;
    };
    if (at) add("time", clockTime(at, Date.now()));
    const row = task && this.#app.cluster.get("tasks", task);
    if (row && this.#path.startsWith("services/")) add("b", `.${this.#app.cluster.slotOf(row) ?? this.#app.cluster.name("nodes", row.node)}`);
    add("span", said);
    line.hidden = !this.#fits(line);
    return line;
  }

  #fits(line) {
    return line.textContent.toLowerCase().includes(this.#filter.value.toLowerCase());
  }
}
