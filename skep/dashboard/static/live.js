/** The stream of the cluster's changes.  An EventSource that is reopened with growing delays. */

const VIEW = "../skep/view";
const DELAYS_S = [1, 2, 4, 8, 15, 30];

/** Feeds `cluster` and calls `changed()`, and `status(state, reason)` with `connecting`, `live` or `lost`. */
export class Live {
  #cluster;
  #changed;
  #status;
  #source = null;
  #failures = 0;
  #timer = null;
  /** Number of the connection.  Answers of earlier ones are ignored. */
  #beginning = 0;

  constructor(cluster, { changed, status }) {
    this.#cluster = cluster;
    this.#changed = changed;
    this.#status = status;
  }

  /** Fetches the first snapshot, which the page's head preloads before any script runs, then opens the stream. */
  async start() {
    this.stop();
    const mine = this.#beginning;
    this.#status("connecting", "");
    if (this.#cluster.cursor === "") {
      const snapshot = await fetch(VIEW).then((response) => (response.ok ? response.json() : null)).catch(() => null);
      if (mine !== this.#beginning) return;
      if (snapshot !== null) {
        this.#cluster.take(snapshot);
        this.#changed();
      }
    }
    this.#open();
  }

  #open() {
    const after = this.#cluster.cursor ? `?after=${encodeURIComponent(this.#cluster.cursor)}` : "";
    const source = new EventSource(`../skep/view/stream${after}`);
    this.#source = source;
    source.addEventListener("open", () => {
      this.#failures = 0;
      this.#status("live", "");
    });
    source.addEventListener("snapshot", (event) => this.#receive(event, (data) => this.#cluster.take(data)));
    source.addEventListener("change", (event) => this.#receive(event, (data) => this.#cluster.apply(data)));
    source.addEventListener("error", () => {
      // The browser reconnects unless the status was not 200.
      if (source.readyState === EventSource.CLOSED) this.#again();
      else this.#status("connecting", "");
    });
  }

  stop() {
    this.#beginning += 1;
    this.#source?.close();
    this.#source = null;
    clearTimeout(this.#timer);
  }

  #receive(event, take) {
    let data;
    try {
      data = JSON.parse(event.data);
    } catch {
      // A cut line cannot be applied, so everything is fetched again.
      this.#cluster.cursor = "";
      this.#again();
      return;
    }
    take(data);
    this.#changed();
  }

  async #again() {
    this.stop();
    const delay = DELAYS_S[Math.min(this.#failures, DELAYS_S.length - 1)] * (0.75 + Math.random() / 2);
    this.#failures += 1;
    // An EventSource does not say why it ended, but a request does.
    this.#status("lost", await reasonOf(VIEW));
    this.#timer = setTimeout(() => void this.start(), delay * 1000);
  }
}

async function reasonOf(url) {
  try {
    const response = await fetch(url, { method: "GET", signal: AbortSignal.timeout(5000) });
    if (response.ok) {
      await response.body?.cancel();
      return "the stream ended";
    }
    return (await response.json().catch(() => null))?.message ?? `the request failed with status ${response.status}`;
  } catch {
    return "no connection";
  }
}
