/** The frame of the page: top bar, rail, the open page, and the panel beside it. */

import { h } from "./dom.js";
import { headline, problems, totals } from "./cluster.js";
import { PAGES } from "./pages.js";
import { panel } from "./panel.js";
import { showHelp } from "./shortcuts.js";
import { showSearch } from "./search_box.js";
import { badge } from "./widgets.js";
import { logsOfPanel } from "./logs.js";
import { logOut } from "./session.js";
import { clockTime, number } from "./text.js";

const ICONS = {
  hive: "M8 1.500 13.600 4.750v6.500L8 14.500l-5.600-3.250v-6.500z",
  services: "M5 2.500 8 4.250v3.500L5 9.500 2 7.750v-3.500zM11 6.500l3 1.750v3.500l-3 1.750-3-1.750v-3.500z",
  nodes: "M2.500 3h11v4h-11zM2.500 9h11v4h-11zM5 5h.01M5 11h.01",
  tasks: "M3 4h1m2 0h7M3 8h1m2 0h7M3 12h1m2 0h7",
  networks: "M8 3.500v3M4 12.500v-3h8v3M6.500 2h3v2h-3zM2.500 11.500h3v2.500h-3zM10.500 11.500h3v2.500h-3zM8 6.500v3",
  routes: "M2 8h4M6 8l3-4h3.500M6 8l3 4h3.500M11 2.500 12.500 4 11 5.500M11 10.500l1.500 1.500-1.500 1.500",
  stacks: "M8 2 14 5 8 8 2 5zM2 8l6 3 6-3M2 11l6 3 6-3",
  volumes: "M3 4.500c0-3 10-3 10 0v7c0 3-10 3-10 0zM3 4.500c0 2.500 10 2.500 10 0",
  secrets: "M4 7.500h8v6H4zM5.500 7.500V5a2.500 2.500 0 0 1 5 0v2.500",
  events: "M8 2.500a5.500 5.500 0 1 0 .01 0M8 5v3.200l2.200 1.600",
};
const THEME_ICON = "M8 2.500a5.500 5.500 0 1 0 .01 0M8 2.500v11a5.500 5.500 0 0 0 0-11";

const LOGOUT_ICON = "M6.500 2.500h-4v11h4M6 8h7.500M10.500 5l3 3-3 3";

const icon = (path) => h("svg", { class: "icon", viewBox: "0 0 16 16", "aria-hidden": "true" }, h("path", { d: path }));

/** Everything below `<body>`. */
export function shell(app) {
  const page = PAGES.find(({ name }) => name === app.route.page);
  const isOpen = app.route.id !== "";
  logsOfPanel(app);
  return [
    h("a", { key: "skip", class: "skip", href: "#main", onclick: skip }, "Skip to content"),
    h("header", { key: "top" }, brand(app), verdict(app), figures(app), searchField(app), connection(app)),
    rail(app),
    h(
      "main",
      { key: "main", id: "main", tabindex: "-1", class: page.name === "hive" ? "filled" : "", onscroll: (event) => scrolled(app, event) },
      app.live.state === "lost" && h("p", { key: "lost", class: "banner", role: "alert" }, `Not live: ${app.live.reason}. This page shows the last known state. `, app.session.by_login && h("a", { href: "/" }, "Log in")),
      app.notice && h("p", { key: "notice", class: "banner", role: "alert" }, app.notice),
      app.past !== null && h("p", { key: "past", class: "banner past", role: "status" }, `This is the cluster at ${clockTime(app.past / 1000, app.realNow)}.`),
      app.cluster.cursor === "" && app.live.state !== "lost"
        ? h("p", { key: "wait", class: "empty" }, "Reading the cluster…")
        : page.show(app),
    ),
    isOpen && h("aside", { key: "panel", "aria-label": "Details" }, panel(app)),
  ];
}

function skip(event) {
  event.preventDefault();
  document.getElementById("main").focus();
}

function scrolled(app, event) {
  app.scrolled = { top: event.target.scrollTop, height: event.target.clientHeight };
  app.invalidate();
}

function brand(app) {
  const name = app.cluster.info.name;
  return h(
    "a",
    { class: "brand", href: "#/hive" },
    h("svg", { viewBox: "0 0 32 32", "aria-hidden": "true" }, h("path", { d: "M16 2l12.100 7v14L16 30 3.900 23V9z" }), h("path", { class: "hole", d: "M16 10.500l4.800 2.750v5.500L16 21.500l-4.800-2.750v-5.500z" })),
    h("b", {}, "skep"),
    name && h("span", {}, name),
  );
}

/** Whether the cluster is healthy, and the first reason why not. */
function verdict(app) {
  if (app.cluster.cursor === "") return null;
  const found = problems(app.cluster, app.now);
  const { level, word, title, detail } = headline(app.cluster, found);
  const isOld = app.live.state === "lost" && app.past === null;
  // As many as the list that the first reason heads.
  const others = found.filter((one) => (one.level === "busy") === (found[0].level === "busy")).length - 1;
  const more = others > 0 && h("i", {}, `+${number(others)} more`);
  return h(
    "div",
    { key: "verdict", class: "verdict", role: "status", "aria-label": "health of the cluster" },
    h("a", { href: "#/hive", title: [title, detail].filter(Boolean).join(": ") }, badge(isOld ? "quiet" : level, isOld ? `Last known: ${word}` : word), h("span", {}, title, detail && h("span", { class: "detail" }, `: ${detail}`)), more),
  );
}

function figures(app) {
  const { running, desired, ready, nodes } = totals(app.cluster);
  const { managers } = app.cluster.info;
  const figure = (value, of, label, title) =>
    h("span", { class: value < of ? "figure short" : "figure", title: `${number(value)} of ${number(of)} ${title}` }, h("b", {}, number(value)), h("i", {}, `/${number(of)}`), ` ${label}`);
  return h(
    "div",
    { key: "figures", class: "figures", role: "group", "aria-label": "the cluster in figures" },
    figure(running, desired, "tasks", "tasks running"),
    figure(ready, nodes, "nodes", "nodes ready"),
    figure(managers.reachable, managers.total, "managers", "managers reachable"),
  );
}

function searchField(app) {
  return h(
    "button",
    { class: "search", type: "button", onclick: () => showSearch(app), "aria-keyshortcuts": "/" },
    h("svg", { class: "icon", viewBox: "0 0 16 16", "aria-hidden": "true" }, h("path", { d: "M7 2.500a4.500 4.500 0 1 0 .01 0M10.300 10.300 13.500 13.500" })),
    h("span", {}, "Search"),
    h("kbd", {}, "/"),
  );
}

function connection(app) {
  const words = { live: "live", connecting: "connecting", lost: "not live" };
  return h("span", { class: `live ${app.live.state}`, role: "status", title: app.live.reason || undefined }, h("i", {}), words[app.live.state]);
}

function rail(app) {
  const entry = ({ name, title, kinds = [], count: total, isMain, isOfNow }) =>
    h(
      "a",
      {
        key: name,
        href: `#/${name}`,
        class: isMain ? "main" : "more",
        "aria-current": app.route.page === name ? "page" : undefined,
      },
      icon(ICONS[name]),
      h("span", {}, title),
      (kinds.length > 0 || total) && !(isOfNow && app.past !== null) && h("i", {}, number(total ? total(app.cluster) : kinds.reduce((sum, kind) => sum + app.cluster.size(kind), 0))),
    );
  const isOpen = app.memory.get("more pages") === true;
  const current = PAGES.find(({ name }) => name === app.route.page);
  const toggle = () => {
    app.memory.set("more pages", !isOpen);
    app.invalidate();
  };
  const themes = { auto: "Theme: automatic", light: "Theme: light", dark: "Theme: dark" };
  return h(
    "nav",
    { key: "rail", "aria-label": "Pages", class: isOpen ? "open" : "" },
    PAGES.map(entry),
    h("button", { key: "more", class: "phone", type: "button", onclick: toggle, "aria-expanded": String(isOpen), "aria-current": current.isMain ? undefined : "true" }, icon("M3 8h.01M8 8h.01M13 8h.01"), h("span", {}, "More")),
    h(
      "div",
      { key: "foot", class: "foot" },
      app.session.by_login && h("p", { class: "user", title: app.session.roles.join(", ") }, h("b", {}, app.session.user), h("span", {}, ` ${app.session.roles.join(", ")}`)),
      app.session.by_login && h("button", { type: "button", onclick: logOut, title: `Log out ${app.session.user}` }, icon(LOGOUT_ICON), h("span", {}, "Log out")),
      h("button", { type: "button", onclick: () => app.nextTheme(), title: themes[app.theme] }, icon(THEME_ICON), h("span", {}, themes[app.theme])),
      h("button", { type: "button", onclick: () => showHelp(), title: "Keys" }, h("kbd", {}, "?"), h("span", {}, "Keys")),
    ),
  );
}
