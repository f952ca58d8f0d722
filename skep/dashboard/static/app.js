/** The page: its address, when it is drawn, and its keys. */

import { Cluster, KINDS } from "./cluster.js";
import { Live } from "./live.js";
import { Hive } from "./hive.js";
import { Journal } from "./journal.js";
import { Logs } from "./logs.js";
import { Terminal } from "./terminal.js";
import { ApiError, get, stream } from "./api.js";
import { Diagnostics } from "./reach.js";
import { Resources } from "./resources.js";
import { Samples } from "./samples.js";
import { readSession, savedTheme } from "./session.js";
import { shell } from "./shell.js";
import { patch } from "./dom.js";
import { PAGES } from "./pages.js";
import { showHelp } from "./shortcuts.js";
import { showSearch } from "./search_box.js";
import { clean } from "./text.js";

const TICK_MS = 5000;
const PAST_AFTER_MS = 150;
const THEMES = ["auto", "light", "dark"];

class App {
  /** The cluster that is shown, of the present or of an earlier time. */
  cluster = new Cluster();
  /** The time that is shown (milliseconds), or null for the present. */
  past = null;
  logs = new Logs(this);
  terminal = new Terminal();
  journal = new Journal(get, () => this.invalidate());
  resources = new Resources(() => this.invalidate());
  samples = new Samples();
  diagnostics = new Diagnostics(stream, () => this.invalidate());
  /** The user who is logged in, without a name with `skep ui`. */
  session = { user: "", roles: [], by_login: false };
  /** The state of the connection. */
  live = { state: "connecting", reason: "" };
  /** The time from which ages are counted: the present, or the time that is shown. */
  now = Date.now();
  realNow = Date.now();
  route = { page: "hive", kind: "", id: "", tab: "", address: "" };
  /** Address of the last page that was drawn with its objects, for tests. */
  drawn = "";
  scrolled = { top: 0, height: 800 };
  /** State of pages, such as filters, while the dashboard is open. */
  memory = new Map();
  /** An error that is shown until the next page is opened. */
  notice = "";
  theme = savedTheme();
  #frame = 0;
  #drawnVersion = -1;
  #prefersDark = matchMedia("(prefers-color-scheme: dark)");
  #chord = "";
  #present = this.cluster;
  #pastAsked = 0;

  constructor() {
    this.hive = new Hive(this.cluster, (kind, id) => this.open(kind, id));
    this.stream = new Live(this.cluster, {
      changed: () => this.invalidate(),
      status: (state, reason) => {
        this.live = { state, reason };
        this.invalidate();
      },
    });
  }

  start() {
    addEventListener("hashchange", () => this.#follow());
    addEventListener("keydown", (event) => this.#key(event));
    document.addEventListener("visibilitychange", () => this.invalidate());
    this.#prefersDark.addEventListener("change", () => this.applyTheme());
    addEventListener("resize", () => this.invalidate());
    setInterval(() => this.#tick(), TICK_MS);
    this.#follow();
    this.applyTheme();
    void this.stream.start();
    void this.#readSession();
  }

  /** Runs while the page is hidden, so that the charts have no gaps. */
  #tick() {
    this.samples.take(this.#present, Date.now());
    this.invalidate();
  }

  async #readSession() {
    try {
      this.session = await readSession();
      this.invalidate();
    } catch (error) {
      if (!(error instanceof ApiError)) throw error; // what it is about, the stream says
    }
  }

  /** Draws the page in the next frame, or when it becomes visible. */
  invalidate() {
    if (this.#frame === 0 && !document.hidden) {
      this.#frame = requestAnimationFrame(() => {
        this.#frame = 0;
        this.#render();
      });
    }
  }

  #render() {
    this.realNow = Date.now();
    this.now = this.past ?? this.realNow;
    if (this.#present.cursor !== "") void this.journal.refresh(this.#present.version, this.realNow);
    const { page, kind, id } = this.route;
    const title = id && KINDS.includes(kind) ? this.cluster.name(kind, id) : PAGES.find(({ name }) => name === page).title;
    document.title = clean(`${title} · ${this.cluster.info.name || "Skep"}`);
    this.resources.begin();
    this.terminal.keep(this.route.tab === "terminal" ? this.route.id : "");
    patch(document.body, ...shell(this));
    this.resources.end();
    if (this.cluster.cursor !== "") this.drawn = this.route.address;
    if (this.route.page !== "hive") return;
    this.hive.select(this.route.id ? this.route : null);
    if (this.#drawnVersion !== this.cluster.version) {
      this.#drawnVersion = this.cluster.version;
      this.hive.update();
    }
  }

  /** Shows the cluster at an earlier time (milliseconds), or at present (null). */
  async showPast(at) {
    this.past = at;
    this.#pastAsked += 1;
    const mine = this.#pastAsked;
    this.invalidate();
    if (at === null) return this.#show(this.#present);
    await new Promise((resolve) => setTimeout(resolve, PAST_AFTER_MS));
    if (mine !== this.#pastAsked) return undefined;
    const then = new Cluster();
    try {
      then.take(await get(`skep/view?at=${Math.floor(at / 1000)}`));
    } catch (error) {
      if (!(error instanceof ApiError) || mine !== this.#pastAsked) throw error;
      this.past = null;
      this.notice = error.message;
      return this.#show(this.#present);
    }
    return mine === this.#pastAsked ? this.#show(then) : undefined;
  }

  #show(cluster) {
    this.cluster = cluster;
    this.hive.cluster = cluster;
    this.#drawnVersion = -1;
    this.invalidate();
  }

  get isDark() {
    return this.theme === "dark" || (this.theme === "auto" && this.#prefersDark.matches);
  }

  applyTheme() {
    document.documentElement.dataset.theme = this.isDark ? "dark" : "light";
    this.hive.theme();
    this.#drawnVersion = -1;
    this.invalidate();
  }

  nextTheme() {
    this.theme = THEMES[(THEMES.indexOf(this.theme) + 1) % THEMES.length];
    localStorage.setItem("skep-theme", this.theme);
    this.applyTheme();
  }

  /** The address of an object's panel next to the present page. */
  href(kind, id, tab = "") {
    return `#/${this.route.page}/${kind}/${encodeURIComponent(id)}${tab ? `/${tab}` : ""}`;
  }

  open(kind, id, tab = "") {
    location.hash = this.href(kind, id, tab);
  }

  go(page) {
    location.hash = `#/${page}`;
  }

  close() {
    if (this.route.id) this.go(this.route.page);
  }

  #follow() {
    const [, page = "hive", kind = "", id = "", tab = ""] = location.hash.split("/");
    const isKnown = PAGES.some(({ name }) => name === page);
    if (page !== this.route.page) {
      this.scrolled.top = 0;
      this.memory.delete("more pages");
    }
    this.route = { page: isKnown ? page : "hive", kind, id: decode(id), tab, address: location.hash };
    this.notice = "";
    this.invalidate();
  }

  #key(event) {
    const isTyping = event.target.closest?.("input, textarea, select, dialog, .terminal");
    if (isTyping || event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    const page = this.#chord === "g" ? PAGES.find(({ key }) => key === event.key) : undefined;
    this.#chord = event.key === "g" ? "g" : "";
    const does = {
      "/": () => showSearch(this),
      "?": () => showHelp(),
      d: () => this.nextTheme(),
      t: () => this.toggleTable(),
      j: () => this.#row(1),
      k: () => this.#row(-1),
      Escape: () => this.close(),
    }[event.key];
    if (page) this.go(page.name);
    else if (does) does();
    else return;
    event.preventDefault();
  }

  toggleTable() {
    this.memory.set("hive as table", !this.memory.get("hive as table"));
    this.#drawnVersion = -1;
    if (this.route.page !== "hive") this.go("hive");
    this.invalidate();
  }

  /** Moves the focus to the next or previous row of the list. */
  #row(step) {
    const rows = [...document.querySelectorAll("main table.list tbody th a")];
    const here = rows.indexOf(document.activeElement);
    rows[Math.min(rows.length - 1, Math.max(0, here + step))]?.focus();
  }
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return "";
  }
}

const app = new App();
app.start();
// For tests, and for debugging in the console.
globalThis.skep = app;
