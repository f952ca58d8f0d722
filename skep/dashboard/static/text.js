/** Text of the cluster as people may read it: cleaned, shortened, with units.  No DOM here. */

// Control characters, what changes the direction of text, and what has no width: a name may hold all of them.
const UNSAFE = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/gu;
const LONE = /[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;
// Eight marks upon each other are writing, a hundred are a picture over the neighbours.
const MARKS = /(\p{M}{8})\p{M}+/gu;

const TEXT_MAX = 20_000;

/** `value` as text in which nothing hides, moves or reverses: such characters become U+FFFD. */
export function clean(value) {
  let text = typeof value === "string" ? value : String(value ?? "");
  if (text.length > TEXT_MAX) text = `${text.slice(0, TEXT_MAX)}…`;
  return text.replace(LONE, "\ufffd").replace(UNSAFE, "\ufffd").replace(MARKS, "$1");
}

/** The first `max` characters on one line, with an ellipsis when there were more. */
export function short(value, max) {
  const text = clean(value).replace(/\s+/g, " ");
  return text.length > max ? `${text.slice(0, max - 1)}…` : text;
}

/** `docker.io/library/nginx:1.27@sha256:…` as `nginx:1.27`. */
export function imageName(image) {
  return clean(image).replace(/@sha256:[0-9a-f]+$/, "").replace(/^docker\.io\//, "").replace(/^library\//, "");
}

/** `5 s`, `12 min`, `3 h`, `4 d` for a number of seconds. */
export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  const s = Math.max(0, seconds);
  if (s < 60) return `${Math.floor(s)} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  if (s < 2 * 86400) return `${Math.floor(s / 3600)} h`;
  return `${Math.floor(s / 86400)} d`;
}

/** How long before `now` (milliseconds) an instant `at` (seconds, milliseconds or RFC 3339) was; "–" for none. */
export function age(at, now) {
  const then = instant(at);
  return then === null ? "–" : duration((now - then) / 1000);
}

/** Milliseconds since 1970 of an RFC 3339 text or of a number of seconds, or null. */
export function instant(at) {
  if (at === null || at === undefined || at === "" || at === 0) return null;
  if (typeof at === "number") return at * 1000;
  const then = Date.parse(at);
  return Number.isNaN(then) || then <= 0 ? null : then;
}

/** The local time of day of an instant, with the date if that is not today's. */
export function clockTime(at, now) {
  const then = instant(at);
  if (then === null) return "–";
  const date = new Date(then);
  const time = date.toLocaleTimeString([], { hour12: false });
  return date.toDateString() === new Date(now).toDateString()
    ? time
    : `${date.toLocaleDateString([], { day: "numeric", month: "short" })} ${time}`;
}

/** `1.5 GiB` of a number of bytes. */
export function bytes(count) {
  if (!Number.isFinite(count)) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let value = count;
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${value >= 10 || unit === 0 ? Math.round(value) : value.toFixed(1)} ${units[unit]}`;
}

/** `34 %` of a share between 0 and 1. */
export function percent(share) {
  return Number.isFinite(share) ? `${Math.round(share * 100)}\u00a0%` : "–";
}

/** A whole number with thin spaces between thousands.  By hand: the first use of the browser's own takes 20 ms. */
export const number = (value) => String(value).replace(/\B(?=(?:\d{3})+$)/g, "\u202f");

/** `12.5` requests per second; "–" if unknown. */
export function rate(value) {
  if (!Number.isFinite(value)) return "–";
  return value >= 100 ? number(Math.round(value)) : String(Number(value.toPrecision(3)));
}

const LATENCY_MAX_MS = 10_000;

/** `4.2 ms` or `1.5 s` of a number of milliseconds; longer times than the last bucket's are `over 10 s`. */
export function latency(ms) {
  if (!Number.isFinite(ms)) return "–";
  if (ms >= LATENCY_MAX_MS) return "over\u00a010\u00a0s";
  return ms < 1000 ? `${Number(ms.toPrecision(2))}\u00a0ms` : `${Number((ms / 1000).toPrecision(2))}\u00a0s`;
}

/** A sentence with a capital letter. */
export const capitalized = (text) => `${text.slice(0, 1).toUpperCase()}${text.slice(1)}`;

/** `1 task`, `2 tasks`. */
export function count(value, one, many = `${one}s`) {
  return `${number(value)} ${value === 1 ? one : many}`;
}

/** Names in the order people expect: `web-2` before `web-10`. */
export const compareNames = new Intl.Collator("en", { numeric: true }).compare;
