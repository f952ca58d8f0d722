/** Routes of the front door with their requests, as a page and as a part of a service's panel. */

import { h } from "./dom.js";
import { badge, emptyState, fetched, link } from "./widgets.js";
import { table } from "./table.js";
import { age, latency, rate } from "./text.js";

const COMMAND = "skep service expose web app.example.com";
const EVERY_MS = 10_000;
const ERRORS_MAX = 1;

/** The answer of `/skep/door`, requested again every ten seconds. */
const answer = (app) => app.resources.use("skep/door", Math.floor(app.realNow / EVERY_MS));

/** `0.5 %` of the requests, marked if they are many. */
function failed({ ErrorPercent: share }) {
  if (share === undefined) return "–";
  const text = `${share < 10 ? Number(share.toFixed(1)) : Math.round(share)}\u00a0%`;
  return share > ERRORS_MAX ? badge("bad", text) : text;
}

/** `89 d`, until the certificate ends. */
function untilEnd(app, { CertificateExpires: at }) {
  if (!at) return h("span", { class: "quiet" }, "–");
  const left = Date.parse(at) - app.realNow;
  return left > 0 ? h("span", { title: at }, age(app.realNow / 1000, Date.parse(at))) : badge("bad", "expired");
}

const latencyOf = (route, key) => route[`Latency${key.toUpperCase()}`];
const FIGURES = [
  { key: "rate", title: "Requests/s", kind: "number", cell: (route) => rate(route.RequestsPerSecond), sort: (route) => -(route.RequestsPerSecond ?? -1) },
  { key: "failed", title: "Failed", kind: "number", cell: failed, sort: (route) => -(route.ErrorPercent ?? -1) },
  ...[["p50", "Median"], ["p95", "p95"], ["p99", "p99"]].map(([key, title]) => ({
    key, title, kind: key === "p95" ? "number roomy" : "number wide", cell: (route) => latency(latencyOf(route, key)), sort: (route) => -(latencyOf(route, key) ?? -1),
  })),
];

export function routesPage(app) {
  return [
    h("div", { key: "head", class: "head" }, h("h1", {}, "Routes"), h("p", {}, app.past === null ? "Requests over the front door in the last minute." : "Requests are not recorded: this is the present.")),
    h("div", { key: "list" }, fetched(answer(app), (routes) => table(app, {
      id: "routes",
      label: "Routes",
      rows: (Array.isArray(routes) ? routes : []).map((route) => ({ ...route, id: `${route.Route} ${route.ServiceID}` })),
      target: (route) => ["services", route.ServiceID],
      isSelected: (route) => route.ServiceID === app.route.id,
      empty: emptyState(app, "No routes yet. This command leads a host name to a service.", COMMAND),
      columns: [
        { key: "route", title: "Route", cell: (route) => h("span", {}, route.Route, route.Problem && h("small", {}, route.Problem)), sort: (route) => route.Route },
        { key: "service", title: "Service", kind: "roomy", cell: (route) => link(app, "services", route.ServiceID), sort: (route) => route.Service },
        { key: "state", title: "State", cell: (route) => badge(route.Problem ? "bad" : "good", route.Problem ? "failing" : "ok"), sort: (route) => route.Problem ?? "" },
        ...FIGURES,
        { key: "new", title: "New tasks", kind: "number roomy", cell: share, sort: (route) => route.NewPercent ?? -1 },
        { key: "certificate", title: "Certificate", kind: "number wide", cell: (route) => untilEnd(app, route), sort: (route) => Date.parse(route.CertificateExpires ?? "") || Infinity },
        { key: "problem", title: "Reason", kind: "wide rest", cell: (route) => route.Problem ?? "" },
      ],
    }))),
  ];
}

/** The share of new connections for the new tasks during a staged update. */
const share = ({ NewPercent: percent }) => (percent === undefined ? h("span", { class: "quiet" }, "–") : badge("warn", `${percent}\u00a0%`));

/** The routes of a service, or null without any. */
export function routesOf(app, service) {
  const { data } = answer(app);
  const own = Array.isArray(data) ? data.filter(({ ServiceID: id }) => id === service.id) : [];
  if (own.length === 0) return null;
  return h("ul", { class: "plain" }, own.map((route) => h("li", { key: route.Route }, h("b", {}, route.Route), ": ", sentence(app, route))));
}

function sentence(app, route) {
  const parts = route.RequestsPerSecond === undefined
    ? ["no requests in the last minute"]
    : [`${rate(route.RequestsPerSecond)} requests/s`, [failed(route), " failed"], `median ${latency(route.LatencyP50)}`, `p95 ${latency(route.LatencyP95)}`, `p99 ${latency(route.LatencyP99)}`];
  if (route.NewPercent !== undefined) parts.push([share(route), " of new connections to new tasks"]);
  if (route.CertificateExpires) parts.push(["certificate ends in ", untilEnd(app, route)]);
  return parts.flatMap((part, i) => [i > 0 && ", ", part]);
}
