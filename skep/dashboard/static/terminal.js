/** A terminal in a task's container: a WebSocket, a screen and keys. */

import { Screen, colourOf } from "./screen.js";
import { clean } from "./text.js";

const CELL = { width: 7.23, height: 16 };
const KEYS = { Enter: "\r", Backspace: "\u007f", Tab: "\t", Escape: "\u001b", Delete: "\u001b[3~", PageUp: "\u001b[5~", PageDown: "\u001b[6~", Insert: "\u001b[2~" };
const CURSOR_KEYS = { ArrowUp: "A", ArrowDown: "B", ArrowRight: "C", ArrowLeft: "D", Home: "H", End: "F" };
const SHELLS = ["/bin/sh", "/bin/bash", "/bin/ash"];

export class Terminal {
  #box = document.createElement("div");
  #head = document.createElement("p");
  #view = document.createElement("div");
  #input = document.createElement("textarea");
  #task = "";
  #socket = null;
  #screen = null;
  #decoder = null;
  #frame = 0;

  constructor() {
    this.#box.className = "terminal-box";
    this.#view.className = "terminal";
    this.#view.setAttribute("role", "group");
    this.#view.setAttribute("aria-label", "Terminal");
    this.#input.setAttribute("aria-label", "Input of the terminal; Control-Shift-Escape leaves it");
    this.#input.autocapitalize = "off";
    this.#input.spellcheck = false;
    this.#input.addEventListener("keydown", (event) => this.#key(event));
    this.#input.addEventListener("input", () => {
      this.#send(this.#input.value);
      this.#input.value = "";
    });
    this.#input.addEventListener("paste", (event) => {
      event.preventDefault();
      this.#send(event.clipboardData.getData("text").replaceAll(/\r?\n/g, "\r"));
    });
    this.#view.addEventListener("click", () => {
      if (getSelection().isCollapsed) this.#input.focus();
    });
    this.#box.append(this.#head, this.#view);
    new ResizeObserver(() => this.#fit()).observe(this.#view);
  }

  /** The element for a task.  Nothing runs until the user opens it. */
  of(task) {
    if (this.#task !== task.id) {
      this.#end();
      this.#task = task.id;
      this.#offer("Runs a command in the task's container.");
    }
    return this.#box;
  }

  /** Ends the session of any other task. */
  keep(task) {
    if (this.#task !== task) {
      this.#end();
      this.#task = "";
    }
  }

  #offer(text) {
    this.#head.replaceChildren();
    const choice = document.createElement("select");
    choice.setAttribute("aria-label", "Command");
    for (const shell of SHELLS) choice.append(new Option(shell, shell));
    const start = document.createElement("button");
    start.type = "button";
    start.textContent = "Open";
    start.addEventListener("click", () => this.#open(choice.value));
    const note = document.createElement("span");
    note.className = "quiet";
    note.textContent = clean(text);
    this.#head.append(choice, start, note);
  }

  #open(command) {
    this.#end();
    const { rows, columns } = this.#size();
    const url = new URL("../skep/ui/exec", location.href);
    url.protocol = url.protocol.replace("http", "ws");
    url.hash = "";
    url.search = new URLSearchParams({ task: this.#task, command, rows, columns });
    const socket = new WebSocket(url);
    socket.binaryType = "arraybuffer";
    this.#socket = socket;
    this.#screen = new Screen(rows, columns, (text) => this.#send(text));
    this.#decoder = new TextDecoder();
    let end = "The connection was closed.";
    socket.addEventListener("open", () => this.#fit());
    socket.addEventListener("message", ({ data }) => {
      if (socket !== this.#socket) return;
      if (typeof data === "string") end = ended(data);
      else {
        this.#screen.write(this.#decoder.decode(data, { stream: true }));
        this.#draw();
      }
    });
    socket.addEventListener("close", () => {
      if (socket === this.#socket) {
        this.#socket = null;
        this.#offer(end);
      }
    });
    this.#head.textContent = `${command} · Control-Shift-Escape leaves the terminal`;
    this.#draw();
    this.#input.focus();
  }

  #end() {
    this.#socket?.close();
    this.#socket = null;
    this.#screen = null;
    this.#view.replaceChildren(this.#input);
  }

  #send(text) {
    if (this.#socket?.readyState === WebSocket.OPEN) this.#socket.send(new TextEncoder().encode(text));
  }

  #size() {
    return {
      rows: Math.max(4, Math.floor((this.#view.clientHeight - 16) / CELL.height)),
      columns: Math.max(20, Math.floor((this.#view.clientWidth - 20) / CELL.width)),
    };
  }

  #fit() {
    const { rows, columns } = this.#size();
    if (!this.#screen || !this.#view.isConnected || (rows === this.#screen.rows && columns === this.#screen.columns)) return;
    this.#screen.resize(rows, columns);
    if (this.#socket?.readyState === WebSocket.OPEN) this.#socket.send(JSON.stringify({ resize: { rows, columns } }));
    this.#draw();
  }

  #draw() {
    if (this.#frame !== 0) return;
    this.#frame = requestAnimationFrame(() => {
      this.#frame = 0;
      if (this.#screen) this.#view.replaceChildren(...Array.from({ length: this.#screen.rows }, (_, row) => this.#row(row)), this.#input);
      // The element was removed and inserted again, which lost the focus.
      if (this.#screen && this.#socket && !document.activeElement?.closest("dialog, input, button, a")) this.#input.focus({ preventScroll: true });
    });
  }

  #row(row) {
    const line = document.createElement("div");
    const { cursor } = this.#screen;
    let column = 0;
    for (const { text, look } of this.#screen.runs(row)) {
      const characters = [...text];
      const at = cursor.isShown && cursor.row === row ? cursor.column - column : -1;
      if (at >= 0 && at < characters.length) {
        line.append(part(characters.slice(0, at), look), part([characters[at]], look, true), part(characters.slice(at + 1), look));
      } else line.append(part(characters, look));
      column += characters.length;
    }
    return line;
  }

  #key(event) {
    if (event.key === "Escape" && event.ctrlKey && event.shiftKey) {
      this.#input.blur();
      document.getElementById("main").focus();
      return;
    }
    let text = KEYS[event.key];
    if (event.key in CURSOR_KEYS) text = `\u001b${this.#screen?.hasApplicationKeys ? "O" : "["}${CURSOR_KEYS[event.key]}`;
    else if (event.ctrlKey && !event.altKey && !event.metaKey && /^[a-z@[\\\]^_ ]$/i.test(event.key) && !(event.shiftKey && /[cv]/i.test(event.key))) {
      text = String.fromCharCode(event.key.toUpperCase().charCodeAt(0) & 31);
    } else if (event.altKey && !event.ctrlKey && event.key.length === 1) text = `\u001b${event.key}`;
    if (text === undefined || event.isComposing) return;
    event.preventDefault();
    event.stopPropagation();
    this.#send(text);
  }
}

/** The server's last message as a sentence. */
function ended(data) {
  try {
    const message = JSON.parse(data);
    return message.error ?? `The command ended with exit code ${message.exit_code}.`;
  } catch {
    return "The connection was closed.";
  }
}

function part(characters, look, isCursor = false) {
  const element = document.createElement("span");
  element.textContent = characters.map((character) => clean(character)).join("");
  element.className = [look.bold && "b", look.underline && "u", isCursor && "cursor"].filter(Boolean).join(" ");
  const [fg, bg] = look.inverse ? [look.bg === "" ? 0 : look.bg, look.fg === "" ? 7 : look.fg] : [look.fg, look.bg];
  if (fg !== "" && !isCursor) element.style.color = colourOf(fg);
  if (bg !== "" && !isCursor) element.style.background = colourOf(bg);
  return element;
}
