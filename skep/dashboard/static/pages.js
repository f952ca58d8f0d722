/** The pages of the rail: each lists one kind of object, the first draws the cluster. */

import { h, own } from "./dom.js";
import { byUrgency, lastHeard, phase, problems, progress, replicasText } from "./cluster.js";
import { ago, badge, button, chart, link, links, loadInWords, meter, swatch, taskGlyph } from "./parts.js";
import { portsText } from "./ports.js";
import { diagnosed, failing } from "./reach.js";
import { families, familyOf, uptake } from "./versions.js";
import { table } from "./table.js";
import { count, duration, imageName, percent } from "./text.js";
import { orderedNodes } from "./scene.js";
import { eventsPage, timeline } from "./events.js";

const byName = (row) => row.name;
const sortedBy = (rows, name = byName) => [...rows].sort((a, b) => (name(a) < name(b) ? -1 : 1));

/** A list with its heading. */
function listPage(app, title, { note, ...list }) {
  return [
    h("div", { key: "head", class: "head" }, h("h1", {}, title), note && h("p", {}, note)),
    table(app, { label: title, isSelected: (row) => row.id === app.route.id, ...list }),
  ];
}

// --- the hive

function hivePage(app) {
  const isTable = app.memory.get("hive as table") === true;
  return [
    h(
      "div",
      { key: "hive", class: "hive" },
      h(
        "div",
        { key: "stage", class: "stage" },
        h("div", { key: "title", class: "stage-head" },
          h("h1", {}, "Hive"),
          h("p", {}, `${count(app.cluster.size("nodes"), "node")}, ${count(app.cluster.size("tasks"), "task")}`),
          h("div", { class: "tools", role: "group", "aria-label": "view" },
            !isTable && [
              tool("+", "Zoom in", () => app.hive.zoom(1.5)),
              tool("−", "Zoom out", () => app.hive.zoom(1 / 1.5)),
              tool("Fit", "Show everything (0)", () => app.hive.fit()),
            ],
            tool(isTable ? "Map" : "Table", "Map or table (t)", () => app.toggleTable()))),
        isTable ? h("div", { key: "table", class: "scroll", tabindex: "0", role: "region", "aria-label": "the hive as a table" }, hiveTable(app)) : own(app.hive.element, "map"),
      ),
      h("div", { key: "side", class: "side", tabindex: "0", role: "region", "aria-label": "what to look at, and the services" }, attention(app), legend(app)),
      timeline(app),
    ),
  ];
}

function tool(label, title, onclick) {
  return h("button", { key: title, type: "button", title, "aria-label": title === "Map or table (t)" ? undefined : title, onclick }, label);
}

function attention(app) {
  const found = problems(app.cluster);
  if (found.length === 0) return h("section", { key: "healthy", class: "healthy" }, h("h2", {}, "All is well"), h("p", {}, "Every service runs as it should."));
  return h(
    "section",
    { key: "attention", class: "attention" },
    h("h2", {}, "To look at"),
    h("ul", {}, found.slice(0, 30).map(({ level, title, detail, target }) =>
      h("li", { class: level }, h("a", { href: target ? app.href(...target) : "#/nodes" }, title), detail && h("p", {}, detail)))),
    found.length > 30 && h("p", { class: "quiet" }, `and ${found.length - 30} more`),
  );
}

const LEGEND_MAX = 60;

function legend(app) {
  const chosen = app.memory.get("highlight");
  const choose = (id) => {
    const next = id === chosen ? undefined : id;
    app.memory.set("highlight", next);
    app.hive.highlight(next === undefined ? null : (task) => task.service === next);
    app.invalidate();
  };
  const services = sortedBy(app.cluster.all("services"));
  return h(
    "section",
    { key: "legend", class: "legend" },
    h("h2", {}, "Services"),
    services.length === 0 && h("p", { class: "quiet" }, "None yet: docker service create, or skep run."),
    h("ul", {}, services.slice(0, LEGEND_MAX).map((service) =>
      h("li", { key: service.id, class: service.id === chosen ? "chosen" : "" },
        h("button", { type: "button", "aria-pressed": String(service.id === chosen), onclick: () => choose(service.id), title: "Show only this service's tasks" },
          swatch(app, service.id), h("span", {}, service.name)),
        h("a", { class: service.state, href: app.href("services", service.id), "aria-label": `${service.name}: ${replicasText(service)}` }, replicasText(service))))),
    services.length > LEGEND_MAX && h("p", { class: "quiet" }, h("a", { href: "#/services" }, `all ${services.length} services`)),
  );
}

function hiveTable(app) {
  const tasks = app.cluster.by("tasks", "node");
  const { cluster } = app;
  const summary = (node) => {
    const groups = new Map();
    for (const task of tasks.get(node.id) ?? []) {
      const key = `${task.service} ${phase(task)}`;
      groups.set(key, [...(groups.get(key) ?? []), task]);
    }
    return [...groups.values()].map((group, i) => {
      const slots = group.filter((task) => task.slot).map((task) => task.slot).sort((a, b) => a - b).join(", ");
      return [i > 0 && ", ", taskGlyph(app, group[0]), " ", link(app, "services", group[0].service), slots ? `.${slots}` : "", phase(group[0]) === "running" ? "" : ` (${phase(group[0])})`];
    });
  };
  const waiting = tasks.get("") ?? [];
  return [
    waiting.length > 0 && h("p", { key: "waiting", class: "note" }, `${count(waiting.length, "task")} without a node: `, waiting.slice(0, 50).map((task, i) => [i > 0 && ", ", h("a", { href: app.href("tasks", task.id) }, cluster.taskName(task))])),
    table(app, {
      id: "hive",
      label: "Nodes with their tasks",
      rows: orderedNodes(cluster),
      target: (node) => ["nodes", node.id],
      empty: "No nodes.",
      columns: [
        { key: "name", title: "Node", cell: (node) => node.name, sort: byName },
        { key: "state", title: "State", cell: nodeState, sort: (node) => node.state },
        { key: "count", title: "Tasks", kind: "number", cell: (node) => String(tasks.get(node.id)?.length ?? 0), sort: (node) => tasks.get(node.id)?.length ?? 0 },
        { key: "tasks", title: "Running there", cell: summary },
      ],
    }),
  ];
}

// --- lists

/** Running tasks of those wanted, as a bar with figures. */
export function replicas(service) {
  const { done, of } = progress(service);
  return h("span", { class: "replicas" }, meter(replicasText(service), [{ share: of ? done / of : 1, kind: service.state }]), h("span", {}, replicasText(service)));
}

const LEVELS = { healthy: "good", converging: "warn", degraded: "bad" };

export function serviceState(service) {
  const update = service.update?.state;
  const word = update && update !== "completed" && update !== "rollback_completed" ? update.replaceAll("_", " ") : service.state;
  return badge(update?.endsWith("paused") ? "bad" : LEVELS[service.state], word);
}

export function nodeState(node) {
  const level = node.state !== "ready" ? "bad" : node.availability === "active" ? "good" : "quiet";
  return badge(level, node.state !== "ready" || node.availability === "active" ? node.state : node.availability);
}

const PHASE_LEVELS = { running: "good", failed: "bad", unhealthy: "bad", unknown: "bad", waiting: "warn", starting: "warn" };

export function taskState(task) {
  return badge(PHASE_LEVELS[phase(task)] ?? "quiet", task.health === "unhealthy" ? "unhealthy" : task.state);
}

function load(node) {
  if (node.load === null) return h("span", { class: "quiet" }, "–");
  const kind = node.load > 0.9 ? "degraded" : node.load > 0.75 ? "converging" : "plain";
  return h("span", { class: "replicas" }, meter(percent(node.load), [{ share: node.load, kind }]), h("span", {}, percent(node.load)));
}

function servicesPage(app) {
  return listPage(app, "Services", {
    id: "services",
    rows: [...app.cluster.all("services")].sort(byUrgency),
    target: (service) => ["services", service.id],
    empty: "No services yet. Create one with docker service create, skep run or a stack file.",
    columns: [
      { key: "name", title: "Name", cell: (service) => [swatch(app, service.id), service.name], sort: byName },
      { key: "replicas", title: "Tasks", cell: replicas, sort: (service) => progress(service).done / (progress(service).of || 1) },
      { key: "state", title: "State", cell: serviceState, sort: (service) => service.state },
      { key: "image", title: "Image", kind: "mono", cell: (service) => imageName(service.image), sort: (service) => service.image },
      { key: "ports", title: "Ports", kind: "wide", cell: (service) => portsText(service.ports, app.cluster.tasksOf("service", service.id)) },
      { key: "updated", title: "Updated", kind: "wide number", cell: (service) => ago(app, service.updated_at), sort: (service) => -service.updated_at },
      { key: "reason", title: "Reason", kind: "wide rest", cell: (service) => service.reason },
    ],
  });
}

function nodesPage(app) {
  const tasks = app.cluster.by("tasks", "node");
  return listPage(app, "Nodes", {
    id: "nodes",
    rows: orderedNodes(app.cluster),
    target: (node) => ["nodes", node.id],
    empty: "No nodes.",
    columns: [
      { key: "name", title: "Name", cell: (node) => node.name, sort: byName },
      { key: "state", title: "State", cell: nodeState, sort: (node) => node.state + node.availability },
      { key: "role", title: "Role", cell: (node) => [node.role, node.leader && h("span", { class: "quiet" }, " · leader"), node.manager === "unreachable" && badge("bad", "unreachable")], sort: (node) => node.role },
      { key: "tasks", title: "Tasks", kind: "number", cell: (node) => String(tasks.get(node.id)?.length ?? 0), sort: (node) => tasks.get(node.id)?.length ?? 0 },
      { key: "load", title: "Load", cell: load, sort: (node) => node.load ?? -1 },
      { key: "hour", title: "Last hour", kind: "wide", cell: (node) => chart(app, node.id, (sample) => sample.load, { label: loadInWords(app, node) }) },
      { key: "address", title: "Address", kind: "mono wide", cell: (node) => node.address, sort: (node) => node.address },
      { key: "engine", title: "Engine", kind: "wide", cell: (node) => node.engine, sort: (node) => node.engine },
      { key: "reason", title: "Reason", kind: "wide rest", cell: (node) => lastHeard(node, app.now) },
    ],
  });
}

export function taskColumns(app, { hasNode = true } = {}) {
  return [
    { key: "name", title: "Task", cell: (task) => [taskGlyph(app, task), app.cluster.taskName(task)], sort: (task) => app.cluster.taskName(task) },
    { key: "state", title: "State", cell: taskState, sort: (task) => task.state },
    hasNode && { key: "node", title: "Node", cell: (task) => (task.node ? link(app, "nodes", task.node) : h("span", { class: "quiet" }, "none yet")), sort: (task) => app.cluster.name("nodes", task.node) },
    { key: "since", title: "For", kind: "number", cell: (task) => ago(app, task.since), sort: (task) => -task.since },
    { key: "image", title: "Image", kind: "mono wide", cell: (task) => imageName(task.image), sort: (task) => task.image },
    { key: "error", title: "Reason", kind: "wide rest", cell: (task) => task.error || (task.node ? "" : task.message) },
  ].filter(Boolean);
}

function tasksPage(app) {
  const tasks = app.cluster.all("tasks");
  return listPage(app, "Tasks", {
    id: "tasks",
    note: `${count(tasks.length, "task")} that matter now; what was replaced is in its service's history.`,
    rows: tasks,
    target: (task) => ["tasks", task.id],
    empty: "No tasks.",
    columns: taskColumns(app),
  });
}

/** Whether nodes reach each other, by the probes; and all of it anew on request. */
function reachability(app) {
  const nodes = app.cluster.all("nodes");
  const wrong = failing(nodes);
  const found = diagnosed(app.diagnostics.lines);
  const { isRunning, error, endedAt } = app.diagnostics;
  return h("section", { key: "reach", class: "reach", "aria-label": "paths between nodes" },
    h("div", { class: "head" },
      wrong.length === 0 ? badge("good", "nodes reach each other") : badge("bad", `${count(wrong.length, "path")} ${wrong.length === 1 ? "fails" : "fail"}`),
      h("p", {}, wrong.length === 0 ? "No probe between nodes fails." : "Found by the probes that nodes send each other:"),
      h("div", { class: "filters" }, button(isRunning ? `Probing… ${found.done} of ${found.asked}` : "Probe now", () => app.diagnostics.run(), { disabled: isRunning, title: "Every node probes every other one (skep doctor network)" }))),
    wrong.length > 0 && h("ul", { class: "paths" }, wrong.slice(0, 50).map(({ from, to, check, port }) =>
      h("li", { key: `${from.id} ${to} ${check}` }, h("a", { href: app.href("nodes", from.id) }, from.name), ` → ${to}`, h("span", { class: "quiet" }, ` ${port} (${check})`)))),
    error && h("p", { class: "note bad" }, error),
    endedAt > 0 && !isRunning && !error && diagnosticsText(app, found, endedAt),
    found.wrong.length + found.errors.length + found.own.length > 0 && h("ul", { class: "paths" },
      found.wrong.slice(0, 50).map(({ from, to, check, port, lost, sent, detail }, i) => h("li", { key: `w${i}` }, `${from} → ${to}`, h("span", { class: "quiet" }, ` ${port} (${check}): ${lost} of ${sent} lost${detail && `; ${detail}`}`))),
      found.errors.map(({ name, error: why }, i) => h("li", { key: `e${i}` }, name, h("span", { class: "quiet" }, `: ${why}`))),
      found.own.map(({ name, text }, i) => h("li", { key: `o${i}` }, name, h("span", { class: "quiet" }, `: ${text}`)))));
}

function diagnosticsText(app, found, endedAt) {
  const { slowest } = found;
  const verdict = found.wrong.length + found.errors.length === 0 ? "everything responds" : `${count(found.wrong.length, "check")} failed, ${count(found.errors.length, "node")} without a result`;
  return h("p", { class: "note quiet" },
    `Probed ${duration((app.realNow - endedAt) / 1000)} ago: ${count(found.asked, "node")}, ${count(found.pairs, "path")}: ${verdict}`,
    slowest && `; the slowest way back took ${slowest.ms.toFixed(1)} ms (${slowest.from} → ${slowest.to})`, ".");
}

function networksPage(app) {
  const [head, list] = networkList(app);
  return [head, reachability(app), list];
}

function networkList(app) {
  return listPage(app, "Networks", {
    id: "networks",
    rows: sortedBy(app.cluster.all("networks")),
    target: (network) => ["networks", network.id],
    empty: "No networks.",
    columns: [
      { key: "name", title: "Name", cell: (network) => network.name, sort: byName },
      { key: "driver", title: "Driver", cell: (network) => network.driver, sort: (network) => network.driver },
      { key: "kind", title: "Kind", cell: networkKind },
      { key: "subnets", title: "Subnets", kind: "mono", cell: (network) => network.subnets.join(" ") },
      { key: "services", title: "Services", kind: "rest", cell: (network) => links(app, "services", network.services), sort: (network) => network.services.length },
    ],
  });
}

export function networkKind(network) {
  const words = ["encrypted", "ingress", "internal", "attachable"].filter((word) => network[word]);
  return words.map((word) => badge("quiet", word));
}

function stacksPage(app) {
  const services = (stack) => stack.services.map((id) => app.cluster.get("services", id)).filter(Boolean);
  return listPage(app, "Stacks", {
    id: "stacks",
    rows: sortedBy(app.cluster.all("stacks")),
    target: (stack) => ["stacks", stack.id],
    empty: "No stacks. Deploy one with skep stack deploy or docker stack deploy.",
    columns: [
      { key: "name", title: "Name", cell: (stack) => stack.name, sort: byName },
      { key: "revision", title: "Revision", kind: "number", cell: (stack) => (stack.revision === null ? "–" : String(stack.revision)), sort: (stack) => stack.revision ?? 0 },
      { key: "state", title: "State", cell: (stack) => stackState(services(stack)) },
      { key: "deployed", title: "Last deploy", cell: (stack) => (stack.revisions?.[0] ? [deployState(stack.revisions?.[0]), " ", h("span", { class: "quiet" }, stack.revisions?.[0].changes)] : h("span", { class: "quiet" }, "not kept")), sort: (stack) => -(stack.revisions?.[0]?.created_at ?? 0) },
      { key: "services", title: "Services", kind: "rest", cell: (stack) => links(app, "services", stack.services), sort: (stack) => stack.services.length },
    ],
  });
}

/** How the deploy of a revision ended. */
export function deployState({ state }) {
  return badge(state.startsWith("failed") ? "bad" : state === "deploying" ? "warn" : "good", state.startsWith("failed") ? "failed" : state || "deployed");
}

export function stackState(services) {
  const worst = ["degraded", "converging"].find((state) => services.some((service) => service.state === state)) ?? "healthy";
  return badge(LEVELS[worst], worst === "healthy" ? "healthy" : `${services.filter((service) => service.state === worst).length} ${worst}`);
}

function volumesPage(app) {
  return [...clusterVolumes(app), localVolumes(app)];
}

/** Volumes of single nodes with the data of services: where each is, of which slot. */
function localVolumes(app) {
  return h("section", { key: "local", class: "below" },
    h("h2", {}, "Volumes of nodes"),
    table(app, {
      id: "local volumes",
      label: "Volumes of nodes",
      rows: sortedBy(localVolumesOf(app.cluster)),
      target: (volume) => ["nodes", volume.node],
      empty: "No service has data in a volume of a node.",
      columns: [
        { key: "name", title: "Name", cell: byName, sort: byName },
        { key: "nodes", title: "On", cell: (volume) => links(app, "nodes", [...volume.nodes]), sort: (volume) => volume.nodes.size },
        { key: "slots", title: "Data of", kind: "rest", cell: (volume) => [...volume.slots].sort().slice(0, 20).join(", ") + (volume.slots.size > 20 ? ` and ${volume.slots.size - 20} more` : "") },
        { key: "used", title: "Last given", kind: "number", cell: (volume) => ago(app, volume.used_at), sort: (volume) => -volume.used_at },
      ],
    }));
}

function localVolumesOf(cluster) {
  const found = new Map();
  for (const node of cluster.all("nodes")) {
    for (const volume of node.volumes ?? []) {
      const row = found.get(volume.name) ?? { id: volume.name, name: volume.name, nodes: new Set(), slots: new Set(), used_at: 0, node: node.id };
      found.set(volume.name, row);
      row.nodes.add(node.id);
      row.slots.add(`${volume.service}.${volume.slot}`);
      row.used_at = Math.max(row.used_at, volume.used_at);
    }
  }
  return [...found.values()];
}

function clusterVolumes(app) {
  return listPage(app, "Cluster volumes", {
    id: "volumes",
    rows: sortedBy(app.cluster.all("volumes")),
    target: (volume) => ["volumes", volume.id],
    empty: "No cluster volumes.",
    columns: [
      { key: "name", title: "Name", cell: (volume) => volume.name, sort: byName },
      { key: "driver", title: "Driver", kind: "mono", cell: (volume) => volume.driver, sort: (volume) => volume.driver },
      { key: "state", title: "State", cell: (volume) => badge(volume.reason ? "bad" : volume.state === "in use" ? "good" : "quiet", volume.state), sort: (volume) => volume.state },
      { key: "nodes", title: "On", cell: (volume) => links(app, "nodes", volume.nodes) },
      { key: "reason", title: "Reason", kind: "wide rest", cell: (volume) => volume.reason },
    ],
  });
}

/** `3 of 5 tasks` that run have this version. */
export function uptakeText(app, row) {
  if (row.services.length === 0) return h("span", { class: "quiet" }, "not used");
  const { have, wait } = uptake(app.cluster, row);
  const text = `${have} of ${count(have + wait, "task")}`;
  return h("span", { class: "replicas" }, meter(text, [{ share: have + wait ? have / (have + wait) : 1, kind: wait ? "converging" : "healthy" }]), h("span", {}, text));
}

function secretsPage(app) {
  const of = (kind) => app.cluster.all(kind).map((row) => ({ ...row, kind }));
  const versions = { secrets: families(app.cluster.all("secrets")), configs: families(app.cluster.all("configs")) };
  const place = (row) => {
    const all = versions[row.kind].get(familyOf(row));
    return all.length === 1 ? "" : `${all.length - all.findIndex(({ id }) => id === row.id)} of ${all.length}`;
  };
  return listPage(app, "Secrets and configs", {
    id: "secrets",
    note: "By name and use; their data is never sent to this page.",
    rows: sortedBy([...of("secrets"), ...of("configs")]),
    target: (row) => [row.kind, row.id],
    empty: "No secrets and no configs.",
    columns: [
      { key: "name", title: "Name", cell: byName, sort: byName },
      { key: "kind", title: "Kind", cell: (row) => row.kind.slice(0, -1), sort: (row) => row.kind },
      { key: "version", title: "Version", kind: "wide", cell: (row) => place(row) || h("span", { class: "quiet" }, "the only one"), sort: (row) => `${familyOf(row)} ${row.created_at}` },
      { key: "uptake", title: "Uptake", cell: (row) => uptakeText(app, row) },
      { key: "created", title: "Created", kind: "number", cell: (row) => ago(app, row.created_at), sort: (row) => -row.created_at },
      { key: "stack", title: "Stack", kind: "wide", cell: (row) => row.stack, sort: (row) => row.stack },
      { key: "services", title: "Used by", kind: "rest", cell: (row) => links(app, "services", row.services), sort: (row) => row.services.length },
    ],
  });
}

/** In the order of the rail; `key` follows `g`; `isMain`: in the bar of a phone. */
export const PAGES = [
  { name: "hive", title: "Hive", key: "h", isMain: true, show: hivePage },
  { name: "services", title: "Services", key: "s", kinds: ["services"], isMain: true, show: servicesPage },
  { name: "nodes", title: "Nodes", key: "n", kinds: ["nodes"], isMain: true, show: nodesPage },
  { name: "tasks", title: "Tasks", key: "t", kinds: ["tasks"], show: tasksPage },
  { name: "networks", title: "Networks", key: "w", kinds: ["networks"], show: networksPage },
  { name: "stacks", title: "Stacks", key: "k", kinds: ["stacks"], show: stacksPage },
  { name: "volumes", title: "Volumes", key: "v", count: (cluster) => cluster.size("volumes") + localVolumesOf(cluster).length, show: volumesPage },
  { name: "secrets", title: "Secrets, configs", key: "c", kinds: ["secrets", "configs"], show: secretsPage },
  { name: "events", title: "Events", key: "e", isMain: true, show: eventsPage },
];
