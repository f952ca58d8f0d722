/** The pages of the rail.  The first draws the cluster, the others list one kind of object each. */

import { h, own } from "./dom.js";
import { attentionInWords, availabilityText, byUrgency, capacity, headline, isEnded, lastHeard, phase, problems, progress, replicasText } from "./cluster.js";
import { ago, badge, button, chart, chartSpan, command, emptyState, glyph, imageCell, link, links, loadInWords, meter, serviceGlyph, since, taskGlyph } from "./widgets.js";
import { portsText } from "./ports.js";
import { diagnosed, failing } from "./reach.js";
import { families, familyOf, uptake } from "./versions.js";
import { table } from "./table.js";
import { bytes, capitalized, count, duration, number, percent, short } from "./text.js";
import { orderedNodes } from "./scene.js";
import { eventsPage, timeline } from "./events.js";
import { routesPage } from "./routes.js";

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
  const isUnused = app.past === null && app.cluster.size("services") === 0;
  return [
    h(
      "div",
      { key: "hive", class: "hive" },
      h("div", { key: "side", class: "side", tabindex: "0", role: "region", "aria-label": "Needs attention, and services" }, attention(app), serviceList(app)),
      h(
        "div",
        { key: "stage", class: "stage" },
        h("div", { key: "title", class: "stage-head" },
          h("h1", {}, "Hive"),
          h("p", {}, capacityInWords(app.cluster)),
          h("div", { class: "tools", role: "group", "aria-label": "View" },
            !isTable && [
              tool("+", "Zoom in", () => app.hive.zoom(1.5)),
              tool("−", "Zoom out", () => app.hive.zoom(1 / 1.5)),
              tool("Fit", "Show everything (0)", () => app.hive.fit()),
            ],
            tool(isTable ? "Map" : "Table", "Map or table (t)", () => app.toggleTable()))),
        isTable ? h("div", { key: "table", class: "scroll", tabindex: "0", role: "region", "aria-label": "The hive as a table" }, hiveTable(app)) : own(app.hive.element, "map"),
        isUnused && firstSteps(app),
        legend(app, isTable),
      ),
      timeline(app),
    ),
  ];
}

function tool(label, title, onclick) {
  return h("button", { key: title, type: "button", title, "aria-label": title === "Map or table (t)" ? undefined : title, onclick }, label);
}

/** `3 nodes, 24 CPUs, 96 GiB of memory, load 34 % on average, 71 % on w2`. */
function capacityInWords(cluster) {
  const { nodes, cpus, memory, load, busiest } = capacity(cluster);
  const parts = [count(nodes, "node"), count(Math.round(cpus), "CPU"), `${bytes(memory)} of memory`];
  if (load !== null) parts.push(nodes === 1 || percent(load) === percent(busiest.load) ? `load ${percent(load)}` : `load ${percent(load)} on average, ${percent(busiest.load)} on ${short(busiest.name, 20)}`);
  return parts.join(", ");
}

const ATTENTION_MAX = 30;

function attention(app) {
  const found = problems(app.cluster, app.now);
  const isAll = app.memory.get("all problems") === true;
  const shown = isAll ? found : found.slice(0, ATTENTION_MAX);
  const list = (ones) => h("ul", {}, ones.map(({ level, title, detail, target }) =>
    h("li", { class: level }, target ? h("a", { href: app.href(...target) }, title) : h("b", {}, capitalized(title)), detail && h("p", {}, detail))));
  const busy = shown.filter(({ level }) => level === "busy");
  const urgent = shown.filter(({ level }) => level !== "busy");
  const toggle = () => {
    app.memory.set("all problems", !isAll);
    app.invalidate();
  };
  const { level, word, title } = headline(app.cluster, found);
  return [
    urgent.length > 0
      ? h("section", { key: "attention", class: "notes attention" }, h("h2", {}, "Needs attention", h("i", {}, attentionInWords(found))), list(urgent))
      : level === "good" && h("section", { key: "healthy", class: "healthy" }, h("h2", {}, word), h("p", {}, `${capitalized(title)}.`)),
    busy.length > 0 && h("section", { key: "busy", class: "notes progress" }, h("h2", {}, "In progress", h("i", {}, count(found.filter((one) => one.level === "busy").length, "service"))), list(busy)),
    found.length > ATTENTION_MAX && h("section", { key: "more" }, button(isAll ? "Show fewer" : `Show all ${number(found.length)}`, toggle)),
  ];
}

const SERVICES_MAX = 60;

/** The services of the hive, those that need attention first.  A chosen one, or the one below the pointer, stands out in the hive. */
function serviceList(app) {
  const chosen = app.memory.get("highlight");
  const show = (id) => app.hive.highlight(id ?? app.memory.get("highlight") ?? null);
  const choose = (id) => {
    app.memory.set("highlight", id === chosen ? undefined : id);
    show();
    app.invalidate();
  };
  const services = [...app.cluster.all("services")].sort(byUrgency);
  if (services.length === 0) return null;
  return h(
    "section",
    { key: "services", class: "services" },
    h("h2", {}, "Services", h("i", {}, "tasks")),
    h("ul", {}, services.slice(0, SERVICES_MAX).map((service) =>
      h("li", { key: service.id, class: service.id === chosen ? "chosen" : "", onpointerenter: () => show(service.id), onpointerleave: () => show() },
        h("button", { type: "button", "aria-pressed": String(service.id === chosen), onclick: () => choose(service.id), title: `Show only the tasks of ${service.name}` },
          serviceGlyph(service), h("span", {}, service.name)),
        h("a", { class: service.state, href: app.href("services", service.id), title: `Open ${service.name}`, "aria-label": `${service.name}: ${replicasText(service)}` }, replicasText(service))))),
    h("p", { class: services.length > SERVICES_MAX ? "quiet" : "quiet phone" }, h("a", { href: "#/services" }, `All ${number(services.length)} services`)),
  );
}

const TASK_LEGEND = [["running", true], ["starting", true], ["pending", true], ["unhealthy", true], ["failed", true], ["stopping", false], ["completed", false], ["unknown", false]];
const NODE_SHAPES = {
  leader: h("path", { class: "full", d: "M6 1.500 10 3.750v4.500L6 10.500 2 8.250v-4.500z" }),
  manager: h("path", { class: "outline", d: "M6 1.500 10 3.750v4.500L6 10.500 2 8.250v-4.500z" }),
  load: h("path", { d: "M3.250 1.200h5.500L11.500 6" }),
  down: h("path", { d: "M.500 6 3.250 1.200h5.500L11.500 6 8.750 10.800h-5.500z" }),
  drained: h("path", { d: "M1.300 4.600.500 6l.8 1.400M2.500 2.600l.75-1.400h1.600M7.200 1.200h1.550l.75 1.400M10.700 4.600l.8 1.400-.8 1.400M9.500 9.400l-.75 1.400h-1.550M4.850 10.800h-1.600l-.75-1.400" }),
};
const NODE_LEGEND = [["leader", "leader"], ["manager", "manager"], ["load", "load"], ["down", "down"], ["drained", "drained or paused"]];

/** The shapes of the hive and their meaning. */
function legend(app, isTable) {
  const phases = new Set(app.cluster.all("tasks").map(phase));
  const words = { unknown: "node unreachable" };
  const row = (title, entries) => h("div", { key: title, class: "legend" }, h("b", {}, title),
    h("ul", { "aria-label": `Shapes of ${title.toLowerCase()}` }, entries.map(([name, shape, text]) => h("li", { key: name }, shape, text))));
  return [
    row("Tasks", TASK_LEGEND.filter(([name, isAlways]) => isAlways || phases.has(name)).map(([name]) => [name, glyph(name), words[name] ?? name])),
    !isTable && row("Nodes", NODE_LEGEND.map(([name, text]) => [name, h("svg", { class: `glyph node-${name}`, viewBox: "0 0 12 12", "aria-hidden": "true" }, NODE_SHAPES[name]), text])),
  ];
}

/** Three commands for a cluster without services. */
function firstSteps(app) {
  const card = (title, text, line) => h("section", {}, h("h2", {}, title), h("p", {}, text), command(app, line));
  return h("div", { key: "first", class: "first-steps" },
    card("Run a service", "It answers on port 8080 of every node.", COMMANDS.service),
    card("Deploy a stack", "Services, networks and volumes of a Compose file.", COMMANDS.stack),
    card("Add a node", "Prints the command to run on the new machine.", COMMANDS.node));
}

const COMMANDS = {
  service: "docker service create --name web --publish 8080:80 nginx",
  stack: "skep stack deploy -c compose.yaml shop",
  node: "docker swarm join-token worker",
  network: "docker network create --driver overlay --attachable front",
  volume: "docker service create --name db --mount type=volume,source=db,target=/data redis",
  clusterVolume: "docker volume create --driver DRIVER --type mount --scope single orders",
  secret: "docker secret create db-password password.txt",
};

function hiveTable(app) {
  const tasks = app.cluster.by("tasks", "node");
  const { cluster } = app;
  const summary = (node) => {
    const groups = new Map();
    for (const task of tasks.get(node.id) ?? []) {
      const key = `${task.service} ${phase(task)}`;
      groups.set(key, [...(groups.get(key) ?? []), task]);
    }
    return [...groups.values()].map((group) => {
      const slots = group.map((task) => cluster.slotOf(task)).filter((slot) => slot !== null).sort((a, b) => a - b).join(", ");
      return h("span", {}, taskGlyph(group[0]), " ", link(app, "services", group[0].service), slots ? `.${slots}` : "", phase(group[0]) === "running" ? "" : ` (${phase(group[0])})`);
    });
  };
  const waiting = tasks.get("") ?? [];
  return [
    waiting.length > 0 && h("p", { key: "waiting", class: "note" }, `${count(waiting.length, "pending task")}: `, waiting.slice(0, 50).map((task, i) => [i > 0 && ", ", h("a", { href: app.href("tasks", task.id) }, cluster.taskName(task))])),
    table(app, {
      id: "hive",
      label: "Nodes with their tasks",
      rows: orderedNodes(cluster),
      target: (node) => ["nodes", node.id],
      empty: emptyState(app, "No nodes."),
      columns: [
        { key: "name", title: "Node", cell: (node) => node.name, sort: byName },
        { key: "state", title: "State", cell: nodeState, sort: (node) => node.state },
        { key: "count", title: "Tasks", kind: "number", cell: (node) => String(tasks.get(node.id)?.length ?? 0), sort: (node) => tasks.get(node.id)?.length ?? 0 },
        { key: "tasks", title: "Tasks by service", cell: summary },
      ],
    }),
  ];
}

// --- lists

/** Running tasks of the desired number, as a bar with figures. */
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
  return badge(level, node.state !== "ready" || node.availability === "active" ? node.state : availabilityText(node));
}

const PHASE_LEVELS = { running: "good", failed: "bad", unhealthy: "bad", pending: "warn", starting: "warn" };

export function taskState(task) {
  const name = phase(task);
  return badge(PHASE_LEVELS[name] ?? "quiet", ["unhealthy", "stopping"].includes(name) ? name : task.state);
}

function load(node) {
  if (node.load === null || node.state !== "ready") return h("span", { class: "quiet" }, "–");
  const kind = node.load > 0.9 ? "degraded" : node.load > 0.75 ? "converging" : "plain";
  return h("span", { class: "replicas" }, meter(percent(node.load), [{ share: node.load, kind }]), h("span", {}, percent(node.load)));
}

function servicesPage(app) {
  return listPage(app, "Services", {
    id: "services",
    rows: [...app.cluster.all("services")].sort(byUrgency),
    target: (service) => ["services", service.id],
    empty: emptyState(app, "No services yet. This command starts one, on port 8080 of every node.", COMMANDS.service),
    columns: [
      { key: "name", title: "Name", cell: (service) => [serviceGlyph(service), named(service.name, service.reason)], sort: byName },
      { key: "replicas", title: "Tasks", kind: "full", cell: replicas, sort: (service) => progress(service).done / (progress(service).of || 1) },
      { key: "state", title: "State", cell: serviceState, sort: (service) => service.state },
      { key: "image", title: "Image", kind: "mono", cell: (service) => imageCell(service.image), sort: (service) => service.image },
      { key: "ports", title: "Ports", kind: "wide", cell: (service) => portsText(service.ports, app.cluster.tasksOf("service", service.id)) },
      { key: "updated", title: "Updated", kind: "wide number", cell: (service) => ago(app, service.updated_at), sort: (service) => -service.updated_at },
      { key: "reason", title: "Reason", kind: "wide rest", cell: (service) => service.reason },
    ],
  });
}

/** A name with the reason below it where the list has no room for a column of reasons. */
function named(name, reason) {
  return h("span", {}, name, reason && h("small", {}, reason));
}

const needsAttention = (node) => (node.state !== "ready" ? 2 : Number(node.reason !== ""));

function nodesPage(app) {
  const tasks = app.cluster.by("tasks", "node");
  return listPage(app, "Nodes", {
    id: "nodes",
    rows: [...orderedNodes(app.cluster)].sort((a, b) => needsAttention(b) - needsAttention(a)),
    target: (node) => ["nodes", node.id],
    empty: emptyState(app, "No nodes yet. This command prints what to run on a new machine.", COMMANDS.node),
    columns: [
      { key: "name", title: "Name", cell: (node) => named(node.name, lastHeard(node, app.now)), sort: byName },
      { key: "state", title: "State", cell: nodeState, sort: (node) => node.state + node.availability },
      { key: "role", title: "Role", kind: "roomy", cell: (node) => [node.role, node.leader && h("span", { class: "quiet" }, " · leader"), node.manager === "unreachable" && badge("bad", "unreachable")], sort: (node) => node.role },
      { key: "tasks", title: "Tasks", kind: "number", cell: (node) => String(tasks.get(node.id)?.length ?? 0), sort: (node) => tasks.get(node.id)?.length ?? 0 },
      { key: "load", title: "Load", cell: load, sort: (node) => node.load ?? -1 },
      { key: "hour", title: `Last ${chartSpan(app)}`, kind: "wide", cell: (node) => chart(app, node.id, (sample) => sample.load, { label: loadInWords(app, node) }) },
      { key: "capacity", title: "Capacity", kind: "wide", cell: (node) => `${count(node.cpus, "CPU")}, ${bytes(node.memory)}`, sort: (node) => node.memory },
      { key: "address", title: "Address", kind: "mono wide", cell: (node) => node.address, sort: (node) => node.address },
      { key: "engine", title: "Engine", kind: "wide", cell: (node) => node.engine, sort: (node) => node.engine },
      { key: "reason", title: "Reason", kind: "wide rest", cell: (node) => lastHeard(node, app.now) },
    ],
  });
}

/** The error of a task, with an exit code as in `skep status`, or why it waits. */
const reasonOf = (task) => task.error.replace(/^task: non-zero exit \((\d+)\)/, "exit $1") || (task.node ? "" : task.message);

export function taskColumns(app, { hasNode = true } = {}) {
  return [
    { key: "name", title: "Task", cell: (task) => [taskGlyph(task), named(app.cluster.taskName(task), reasonOf(task))], sort: (task) => app.cluster.taskName(task) },
    { key: "state", title: "State", cell: taskState, sort: (task) => task.state },
    hasNode && { key: "node", title: "Node", cell: (task) => (task.node ? link(app, "nodes", task.node) : h("span", { class: "quiet" }, "not placed")), sort: (task) => app.cluster.name("nodes", task.node) },
    { key: "since", title: "In this state", kind: "number roomy", cell: (task) => since(app, task.since), sort: (task) => -task.since },
    { key: "image", title: "Image", kind: "mono wide", cell: (task) => imageCell(task.image), sort: (task) => task.image },
    { key: "error", title: "Reason", kind: "wide rest", cell: reasonOf },
  ].filter(Boolean);
}

const PHASE_URGENCY = { failed: 0, unhealthy: 0, pending: 1, unknown: 2, starting: 3, stopping: 4, running: 5, completed: 6 };
/** A task that starts after failures is in a crash loop, which is as urgent as a failure. */
const urgencyOf = (task) => (task.error && phase(task) === "starting" ? 0 : PHASE_URGENCY[phase(task)]);
let sortedTasks = { tasks: null, rows: [] };

/** Tasks that need attention first, then by service and slot.  Sorted once for each state of the cluster. */
function tasksByUrgency(cluster) {
  const tasks = cluster.all("tasks");
  if (sortedTasks.tasks !== tasks) {
    const names = new Map(sortedBy(cluster.all("services")).map(({ id }, i) => [id, i]));
    const keys = new Map(tasks.map((task) => [task, [urgencyOf(task), names.get(task.service) ?? -1, task.slot ?? 0]]));
    const compare = (a, b) => a[0] - b[0] || a[1] - b[1] || a[2] - b[2];
    sortedTasks = { tasks, rows: [...tasks].sort((a, b) => compare(keys.get(a), keys.get(b))) };
  }
  return sortedTasks.rows;
}

function tasksPage(app) {
  return listPage(app, "Tasks", {
    id: "tasks",
    note: "Tasks that were replaced are in the history of their service.",
    rows: tasksByUrgency(app.cluster),
    target: (task) => ["tasks", task.id],
    empty: emptyState(app, "No tasks yet. Every replica of a service is a task.", COMMANDS.service),
    columns: taskColumns(app),
  });
}

/** Whether nodes reach each other by their regular probes, and a button that probes all paths now. */
function reachability(app) {
  const nodes = app.cluster.all("nodes");
  const wrong = failing(nodes);
  const found = diagnosed(app.diagnostics.lines);
  const { isRunning, error, endedAt } = app.diagnostics;
  return h("section", { key: "reach", class: "reach", "aria-label": "Paths between nodes" },
    h("div", { class: "head" },
      wrong.length === 0 ? badge("good", "all paths work") : badge("bad", `${count(wrong.length, "path")} ${wrong.length === 1 ? "fails" : "fail"}`),
      h("p", {}, "Ready nodes probe each other all the time."),
      h("div", { class: "filters" }, button(isRunning ? `Probing… ${found.done} of ${found.asked}` : "Probe now", () => app.diagnostics.run(), { disabled: isRunning, title: "Every node probes every other node, as skep doctor network does" }))),
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
  const verdict = found.wrong.length + found.errors.length === 0 ? "all respond" : `${count(found.wrong.length, "check")} failed, ${count(found.errors.length, "node")} did not report`;
  return h("p", { class: "note quiet" },
    `Probed ${duration((app.realNow - endedAt) / 1000)} ago: ${count(found.asked, "node")}, ${count(found.pairs, "path")}: ${verdict}`,
    slowest && `, slowest round trip ${slowest.ms.toFixed(1)} ms (${slowest.from} → ${slowest.to})`, ".");
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
    empty: emptyState(app, "No networks yet. This command creates one that spans all nodes.", COMMANDS.network),
    columns: [
      { key: "name", title: "Name", cell: (network) => network.name, sort: byName },
      { key: "driver", title: "Driver", kind: "roomy", cell: (network) => network.driver, sort: (network) => network.driver },
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
    empty: emptyState(app, "No stacks yet. This command deploys a Compose file.", COMMANDS.stack),
    columns: [
      { key: "name", title: "Name", cell: (stack) => stack.name, sort: byName },
      { key: "revision", title: "Revision", kind: "number roomy", cell: (stack) => (stack.revision === null ? "–" : String(stack.revision)), sort: (stack) => stack.revision ?? 0 },
      { key: "state", title: "State", cell: (stack) => stackState(services(stack)) },
      { key: "deployed", title: "Last deploy", kind: "roomy full", cell: (stack) => (stack.revisions?.[0] ? [deployState(stack.revisions?.[0]), " ", h("span", { class: "quiet" }, stack.revisions?.[0].changes)] : h("span", { class: "quiet" }, app.past === null ? "not recorded" : "not known")), sort: (stack) => -(stack.revisions?.[0]?.created_at ?? 0) },
      { key: "services", title: "Services", kind: "rest", cell: (stack) => links(app, "services", stack.services), sort: (stack) => stack.services.length },
    ],
  });
}

/** The result of a deploy. */
export function deployState({ state }) {
  return badge(state.startsWith("failed") ? "bad" : state === "deploying" ? "warn" : "good", state.startsWith("failed") ? "failed" : state || "deployed");
}

export function stackState(services) {
  const worst = ["degraded", "converging"].find((state) => services.some((service) => service.state === state)) ?? "healthy";
  return badge(LEVELS[worst], worst === "healthy" ? "healthy" : `${services.filter((service) => service.state === worst).length} ${worst}`);
}

function volumesPage(app) {
  return [h("div", { key: "head", class: "head" }, h("h1", {}, "Volumes")), localVolumes(app), clusterVolumes(app)];
}

/** Volumes of single nodes that hold data of services. */
function localVolumes(app) {
  return h("section", { key: "local" },
    h("h2", {}, "Local volumes"),
    h("p", { class: "note quiet" }, "Volumes of replicated services and jobs. For global services and plain containers, run ", h("code", {}, "docker volume ls"), " on the node."),
    table(app, {
      id: "local volumes",
      label: "Local volumes",
      rows: sortedBy(localVolumesOf(app.cluster)),
      target: (volume) => ["nodes", volume.node],
      empty: emptyState(app, "No local volumes yet. This command starts a service that keeps its data in one.", COMMANDS.volume),
      columns: [
        { key: "name", title: "Name", cell: byName, sort: byName },
        { key: "nodes", title: "Nodes", cell: (volume) => links(app, "nodes", [...volume.nodes]), sort: (volume) => volume.nodes.size },
        { key: "slots", title: "Used by", kind: "rest", cell: (volume) => [...volume.slots].sort().slice(0, 20).join(", ") + (volume.slots.size > 20 ? ` and ${volume.slots.size - 20} more` : "") },
        { key: "used", title: "Last used", kind: "number roomy", cell: (volume) => isMounted(app.cluster, volume) ? "in use" : ago(app, volume.used_at), sort: (volume) => isMounted(app.cluster, volume) ? -Infinity : -volume.used_at },
      ],
    }));
}

/** Whether a task that has not ended uses a local volume.  `used_at` is the time when the task got it. */
function isMounted(cluster, volume) {
  return [...volume.nodes].some((id) => cluster.tasksOf("node", id).some((task) => !isEnded(task) && volume.slots.has(`${cluster.name("services", task.service)}.${task.slot}`)));
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

/** Volumes of CSI plugins, which tasks find on any node. */
function clusterVolumes(app) {
  return h("section", { key: "cluster", class: "below" },
    h("h2", {}, "Cluster volumes"),
    table(app, {
      id: "volumes",
      label: "Cluster volumes",
      rows: sortedBy(app.cluster.all("volumes")),
      target: (volume) => ["volumes", volume.id],
      isSelected: (volume) => volume.id === app.route.id,
      empty: emptyState(app, "No cluster volumes yet. They need a CSI plugin, and tasks find them on any node.", COMMANDS.clusterVolume),
      columns: [
        { key: "name", title: "Name", cell: (volume) => volume.name, sort: byName },
        { key: "driver", title: "Driver", kind: "mono", cell: (volume) => volume.driver, sort: (volume) => volume.driver },
        { key: "state", title: "State", cell: (volume) => badge(volume.reason ? "bad" : volume.state === "in use" ? "good" : "quiet", volume.state), sort: (volume) => volume.state },
        { key: "nodes", title: "Nodes", cell: (volume) => links(app, "nodes", volume.nodes) },
        { key: "reason", title: "Reason", kind: "wide rest", cell: (volume) => volume.reason },
      ],
    }));
}

/** `3 of 5 tasks`: how many running tasks have this version. */
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
    note: "Their data is never sent to this page.",
    rows: sortedBy([...of("secrets"), ...of("configs")]),
    target: (row) => [row.kind, row.id],
    empty: app.past === null
      ? emptyState(app, "No secrets or configs yet. This command stores a password.", COMMANDS.secret)
      : emptyState(app, "An earlier state of the cluster has no secrets and configs. Go back to now to see them."),
    columns: [
      { key: "name", title: "Name", cell: byName, sort: byName },
      { key: "kind", title: "Kind", kind: "roomy", cell: (row) => row.kind.slice(0, -1), sort: (row) => row.kind },
      { key: "version", title: "Version", kind: "wide", cell: (row) => place(row) || h("span", { class: "quiet" }, "1 of 1"), sort: (row) => `${familyOf(row)} ${row.created_at}` },
      { key: "uptake", title: "In use by", kind: "full", cell: (row) => uptakeText(app, row) },
      { key: "created", title: "Created", kind: "number roomy", cell: (row) => ago(app, row.created_at), sort: (row) => -row.created_at },
      { key: "stack", title: "Stack", kind: "wide", cell: (row) => row.stack, sort: (row) => row.stack },
      { key: "services", title: "Services", kind: "rest", cell: (row) => links(app, "services", row.services), sort: (row) => row.services.length },
    ],
  });
}

/**
 * The pages in the order of the rail.  `key` is typed after `g`; pages with `isMain` are in the bar of a phone.  An earlier
 * state of the cluster has no objects of pages with `isOfNow`.
 */
export const PAGES = [
  { name: "hive", title: "Hive", key: "h", isMain: true, show: hivePage },
  { name: "services", title: "Services", key: "s", kinds: ["services"], isMain: true, show: servicesPage },
  { name: "nodes", title: "Nodes", key: "n", kinds: ["nodes"], isMain: true, show: nodesPage },
  { name: "tasks", title: "Tasks", key: "t", kinds: ["tasks"], show: tasksPage },
  { name: "networks", title: "Networks", key: "w", kinds: ["networks"], show: networksPage },
  { name: "routes", title: "Routes", key: "r", show: routesPage },
  { name: "stacks", title: "Stacks", key: "k", kinds: ["stacks"], show: stacksPage },
  { name: "volumes", title: "Volumes", key: "v", count: (cluster) => cluster.size("volumes") + localVolumesOf(cluster).length, show: volumesPage },
  { name: "secrets", title: "Secrets, configs", key: "c", kinds: ["secrets", "configs"], isOfNow: true, show: secretsPage },
  { name: "events", title: "Events", key: "e", isMain: true, show: eventsPage },
];
