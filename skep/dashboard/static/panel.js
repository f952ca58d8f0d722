/** The panel beside a page: one object in detail, its actions, its logs, its terminal. */

import { h, own } from "./dom.js";
import { availabilityText, isCounted, lastHeard, phase } from "./cluster.js";
import { ago, badge, button, chartSpan, command, facts, fetched, largeChart, link, links, loadInWords, section, serviceGlyph, since, taskGlyph, took } from "./widgets.js";
import { deployState, networkKind, nodeState, replicas, serviceState, stackState, taskColumns, taskState, uptakeText } from "./pages.js";
import { portText, portsText } from "./ports.js";
import { failing } from "./reach.js";
import { routesOf } from "./routes.js";
import { families, familyOf } from "./versions.js";
import { table } from "./table.js";
import { withoutEscapes } from "./log_frames.js";
import { bytes, clockTime, compareNames, count, imageName, number } from "./text.js";
import { nodeActions, serviceActions } from "./actions.js";

const KINDS = {
  services: { one: "service", tabs: ["", "tasks", "logs", "history"], show: servicePanel, actions: serviceActions },
  tasks: { one: "task", tabs: ["", "logs", "terminal"], show: taskPanel },
  nodes: { one: "node", tabs: ["", "tasks"], show: nodePanel, actions: nodeActions },
  networks: { one: "network", tabs: [""], show: networkPanel },
  stacks: { one: "stack", tabs: [""], show: stackPanel },
  volumes: { one: "volume", tabs: [""], show: volumePanel },
  secrets: { one: "secret", tabs: [""], show: secretPanel },
  configs: { one: "config", tabs: [""], show: secretPanel },
};

/** The panel of the object in the address. */
export function panel(app) {
  const { kind, id, tab } = app.route;
  const found = KINDS[kind];
  if (app.cluster.cursor === "") return null;
  const row = found && app.cluster.get(kind, id);
  const close = button("×", () => app.close(), { kind: "close", title: "Close (Esc)" });
  if (!row) {
    return [
      h("div", { key: "head", class: "panel-head" }, h("h2", {}, found ? `${found.one[0].toUpperCase()}${found.one.slice(1)} not found` : "Not found"), close),
      h("p", { key: "gone", class: "note quiet" }, kind === "tasks" ? "It was replaced or removed." : "It was removed or never existed."),
    ];
  }
  const title = kind === "tasks" ? app.cluster.taskName(row) : row.name;
  const mark = kind === "services" ? serviceGlyph(row) : kind === "tasks" ? taskGlyph(row) : null;
  return [
    h("div", { key: `head ${kind}`, class: "panel-head" }, h("h2", {}, mark, title), h("span", { class: "quiet" }, found.one), close),
    found.actions && h("div", { key: `actions ${kind}`, class: "actions" }, found.actions(app, row)),
    found.tabs.length > 1 && h("div", { key: "tabs", class: "tabs" }, found.tabs.map((name) => tabLink(app, name))),
    h("div", { key: `${kind} ${id} ${tab}`, class: `panel-body tab-${tab}` }, found.show(app, row, tab)),
  ];
}

function tabLink(app, name) {
  const { kind, id, tab } = app.route;
  const title = name === "" ? "Overview" : name[0].toUpperCase() + name.slice(1);
  return h("a", { href: app.href(kind, id, name), "aria-current": tab === name ? "true" : undefined }, title);
}

// --- service

function servicePanel(app, service, tab) {
  if (tab === "tasks") return tasksOf(app, "service", service.id);
  if (tab === "logs") return own(app.logs.element, "logs");
  if (tab === "history") return serviceHistory(app, service);
  const requests = app.past === null && routesOf(app, service);
  const explained = app.resources.use(`skep/services/${service.id}/explain`, service);
  return [
    facts(
      ["State", [serviceState(service), " ", replicas(service)]],
      // The section Why has the present reason.
      app.past !== null && service.reason && ["Reason", service.reason],
      ["Image", h("code", {}, imageName(service.image))],
      ["Mode", service.mode.replace("-", " ")],
      service.stack && ["Stack", link(app, "stacks", service.stack)],
      service.ports.length > 0 && ["Ports", portsText(service.ports, app.cluster.tasksOf("service", service.id))],
      service.networks.length > 0 && ["Networks", links(app, "networks", service.networks)],
      service.secrets.length > 0 && ["Secrets", links(app, "secrets", service.secrets)],
      service.configs.length > 0 && ["Configs", links(app, "configs", service.configs)],
      ["Updated", ago(app, service.updated_at)],
    ),
    service.update && rollout(app, service),
    requests && section("Requests", requests),
    section("Why", fetched(explained, (answer) => explanation(answer))),
    section("Placement", spread(app, service)),
  ];
}

/** The present or last update: its state, and how many tasks have the new spec. */
function rollout(app, service) {
  const { update } = service;
  const tasks = app.cluster.tasksOf("service", service.id).filter(isCounted);
  const fresh = tasks.filter((task) => task.current).length;
  const started = update.started_at ? took(app, update.started_at, update.completed_at) : "";
  return section(
    update.state.startsWith("rollback") ? "Rollback" : "Update",
    facts(
      ["State", update.state.replaceAll("_", " ")],
      ["New tasks", `${fresh} of ${number(tasks.length)}`],
      update.message && ["Message", update.message],
      started && (update.completed_at ? ["Duration", started] : ["Started", `${started} ago`]),
    ),
  );
}

/** The answer of `/explain`: the reason, other reasons, nodes that refuse a task, and the last lines of output. */
function explanation(answer) {
  const { Reason: reason, RestartSummary: restarts, Problem: problem, Update: update, Nodes: nodes } = answer;
  // The first sentence is not repeated.
  const others = (found) => (found ?? []).filter(({ Summary: summary }) => !reason?.startsWith(summary));
  const listed = (found) => found.map(({ Name: name, Summary: summary, Tasks: tasks }) =>
    h("li", {}, name && h("b", {}, `${name}: `), summary, tasks > 1 && h("span", { class: "quiet" }, ` (${count(tasks, "task")})`)));
  const [waiting, failed] = [others(answer.Reasons), others(answer.Failures)];
  const end = answer.End ?? problem?.End;
  const lines = end?.Lines ?? [];
  return [
    h("p", {}, reason || answer.Summary),
    reason && h("p", { class: "quiet" }, [problem?.Name, restarts, `${answer.Running} of ${answer.Desired} tasks running`].filter(Boolean).join(", ")),
    waiting.length > 0 && h("ul", { class: "plain" }, listed(waiting)),
    failed.length > 0 && h("ul", { class: "plain failures" }, listed(failed)),
    update && h("p", { class: "quiet" }, [update.Step, update.WaitingFor && `waiting for ${update.WaitingFor}`].filter(Boolean).join(", ")),
    nodes?.length > 0 && h("ul", { class: "plain" }, nodes.slice(0, 50).map(({ Hostname: name, NodeID: id, Reasons: refusals }) =>
      h("li", { key: id }, h("b", {}, `${name || id}: `), refusals?.length ? refusals.join(", ") : "can run it"))),
    end?.HealthOutput && [h("h4", {}, "Last failed health check"), h("pre", { "aria-label": "Last failed health check", tabindex: "0" }, end.HealthOutput)],
    lines.length > 0 && h("h4", {}, "Last lines of output"),
    lines.length > 0 && h("pre", { "aria-label": "Last lines", tabindex: "0" }, lines.map(({ Text: text }) => `${withoutEscapes(text)}\n`)),
  ];
}

/** Whether the exit code is that of a signal from Skep, after a failed health check or a stop. */
const isKilledBySkep = (status) => ["unhealthy", "stop-timeout"].includes(status.End?.Cause);

/** ` with exit code 3` of a task that ended by itself. */
const exitText = (status) => (status.ContainerStatus?.ExitCode && !isKilledBySkep(status) ? ` with exit code ${status.ContainerStatus.ExitCode}` : "");

/** The error of an ended task without its exit code, which `exitText` has, or which only shows Skep's own signal. */
const endText = (status) => status.Err?.replace(/^task: non-zero exit \(\d+\)(: )?/, "").replace(/^dockerexec: /, "") ?? "";

/** A service's tasks by node. */
function spread(app, service) {
  const byNode = new Map();
  for (const task of app.cluster.tasksOf("service", service.id)) byNode.set(task.node, [...(byNode.get(task.node) ?? []), task]);
  if (byNode.size === 0) return h("p", { class: "quiet" }, "No tasks.");
  const nodes = [...byNode].sort(([a], [b]) => compareNames(app.cluster.name("nodes", a), app.cluster.name("nodes", b)));
  return h("ul", { class: "spread" }, nodes.map(([node, tasks]) =>
    h("li", { key: node }, h("span", {}, node ? link(app, "nodes", node) : "not placed"),
      h("span", { class: "cells" }, tasks.slice(0, 60).map((task) =>
        h("a", { key: task.id, href: app.href("tasks", task.id), title: `${app.cluster.taskName(task)}: ${phase(task)}`, "aria-label": `${app.cluster.taskName(task)}, ${phase(task)}` }, taskGlyph(task)))))));
}

function serviceHistory(app, service) {
  const path = `tasks?filters=${encodeURIComponent(JSON.stringify({ service: [service.id] }))}`;
  return fetched(app.resources.use(path, service), (tasks) => {
    const sorted = [...tasks].sort((a, b) => (a.Status?.Timestamp < b.Status?.Timestamp ? 1 : -1)).slice(0, 100);
    if (sorted.length === 0) return h("p", { class: "quiet" }, "No tasks.");
    return h("ol", { class: "history" }, sorted.map((task) => {
      const status = task.Status ?? {};
      return h("li", { key: task.ID, class: ["failed", "rejected"].includes(status.State) ? "bad" : "" },
        h("time", {}, clockTime(status.Timestamp, app.now)),
        h("b", {}, place(app, { service: task.ServiceID, slot: task.Slot, node: task.NodeID })),
        h("span", {}, status.State, exitText(status), task.NodeID ? [" on ", app.cluster.name("nodes", task.NodeID)] : ""),
        (endText(status) || (!status.Err && status.Message !== status.State && status.Message)) && h("p", {}, endText(status) || status.Message));
    }));
  });
}

function tasksOf(app, field, id) {
  const tasks = [...app.cluster.tasksOf(field, id)].sort((a, b) => compareNames(app.cluster.taskName(a), app.cluster.taskName(b)));
  return table(app, {
    id: `tasks of ${field}`,
    label: "Tasks",
    rows: tasks.slice(0, 150),
    target: (task) => ["tasks", task.id],
    empty: h("p", { class: "quiet" }, "No tasks."),
    columns: taskColumns(app, { hasNode: field !== "node" }).filter(({ key }) => key !== "image" && key !== "error"),
  });
}

// --- task

function taskPanel(app, task, tab) {
  if (tab === "logs") return own(app.logs.element, "logs");
  if (tab === "terminal") return own(app.terminal.of(task), "terminal");
  const explained = app.resources.use(`skep/tasks/${task.id}/explain`, task);
  return [
    facts(
      ["State", taskState(task)],
      app.past !== null && task.error && ["Reason", h("span", { class: "bad" }, task.error)],
      task.message && ["Message", task.message],
      ["In this state", since(app, task.since)],
      ["Service", app.cluster.get("services", task.service) ? link(app, "services", task.service) : app.cluster.name("services", task.service)],
      ["Node", task.node ? link(app, "nodes", task.node) : "not placed"],
      ["Image", h("code", {}, imageName(task.image))],
      task.ports?.length > 0 && ["Ports", task.ports.map((port) => portText(port)).join(" ")],
      ["Service spec", task.current ? "current" : "outdated, an update replaces this task"],
      task.health && ["Health", task.health],
      ["ID", h("code", {}, task.id)],
    ),
    section("Why", fetched(explained, explanation)),
    section("Earlier tasks", slotHistory(app, task)),
  ];
}

/** What distinguishes a task from others of its service: `.2`, or the name of its node. */
function place(app, task) {
  const slot = app.cluster.slotOf(task);
  return slot === null ? app.cluster.name("nodes", task.node) : `.${slot}`;
}

/** Earlier tasks in the same slot. */
function slotHistory(app, task) {
  if (!task.service) return null;
  const path = `tasks?filters=${encodeURIComponent(JSON.stringify({ service: [task.service] }))}`;
  const hasSlot = app.cluster.slotOf(task) !== null;
  return fetched(app.resources.use(path, task), (tasks) => {
    const earlier = tasks
      .filter((other) => other.ID !== task.id && (hasSlot ? (other.Slot ?? 0) === (task.slot ?? 0) : other.NodeID === task.node))
      .sort((a, b) => (a.Status?.Timestamp < b.Status?.Timestamp ? 1 : -1));
    if (earlier.length === 0) return h("p", { class: "quiet" }, hasSlot ? "None. This is the first task in its slot." : "None. This is the first task on its node.");
    return h("ol", { class: "history" }, earlier.map(({ ID, Status: status = {}, NodeID: node }) =>
      h("li", { key: ID, class: ["failed", "rejected"].includes(status.State) ? "bad" : "" },
        h("time", {}, clockTime(status.Timestamp, app.now)),
        h("span", {}, status.State, exitText(status), node ? [" on ", app.cluster.name("nodes", node)] : ""),
        endText(status) && h("p", {}, endText(status)))));
  });
}

// --- the others

function nodePanel(app, node, tab) {
  if (tab === "tasks") return tasksOf(app, "node", node.id);
  const labels = Object.entries(node.labels ?? {});
  const tasks = app.cluster.tasksOf("node", node.id);
  const most = Math.max(4, tasks.length, ...app.samples.of(node.id).map((sample) => sample.tasks));
  return [
    facts(
      ["State", [nodeState(node), node.availability === "active" || node.state === "ready" ? "" : badge("quiet", availabilityText(node))]],
      node.reason && ["Reason", lastHeard(node, app.now)],
      ["Role", [node.role, node.leader ? " · leader" : "", node.manager && node.manager !== "reachable" ? ` · ${node.manager}` : ""]],
      ["Load", node.state === "ready" ? loadInWords(app, node) : "not reported"],
      ["Tasks", String(tasks.length)],
      ["CPUs", String(node.cpus)],
      ["Memory", bytes(node.memory)],
      ["Address", h("code", {}, node.address)],
      ["Engine", [node.engine, h("span", { class: "quiet" }, ` ${node.os}/${node.arch}`)]],
      labels.length > 0 && ["Labels", labels.map(([name, value]) => h("code", { class: "label" }, value === "" ? name : `${name}=${value}`))],
      ["ID", h("code", {}, node.id)],
    ),
    section(
      `Load in the last ${chartSpan(app)}`,
      largeChart(app, node.id, (sample) => sample.load, { top: "100 %", label: `load: ${loadInWords(app, node)}` }),
      app.samples.of(node.id).length < 2 && h("p", { class: "quiet" }, "The chart starts now and grows while this page is open."),
    ),
    section(`Tasks in the last ${chartSpan(app)}`, largeChart(app, node.id, (sample) => sample.tasks, { most, top: count(most, "task"), label: `${count(tasks.length, "task")} now` })),
    node.failing_checks?.length > 0 && section("Unreachable nodes", h("ul", { class: "plain" }, failing([node]).map(({ to, check, port }) => h("li", { key: `${to} ${check}` }, to, h("span", { class: "quiet" }, ` ${port} (${check})`))))),
    node.volumes?.length > 0 && section("Volumes", h("ul", { class: "plain" }, node.volumes.map(({ name, service, slot }) => h("li", { key: `${name} ${service} ${slot}` }, h("code", {}, name), h("span", { class: "quiet" }, ` used by ${service}.${slot}`))))),
    section("Tasks", tasks.length === 0 ? h("p", { class: "quiet" }, "No tasks.") : h("div", { class: "cells" }, tasks.slice(0, 200).map((task) =>
      h("a", { key: task.id, href: app.href("tasks", task.id), title: `${app.cluster.taskName(task)}: ${phase(task)}`, "aria-label": `${app.cluster.taskName(task)}, ${phase(task)}` }, taskGlyph(task))))),
  ];
}

function networkPanel(app, network) {
  return [
    facts(
      ["Driver", network.driver],
      ["Kind", networkKind(network)],
      network.subnets.length > 0 && ["Subnets", h("code", {}, network.subnets.join(" "))],
      network.stack && ["Stack", link(app, "stacks", network.stack)],
      ["ID", h("code", {}, network.id)],
    ),
    section("Services", serviceList(app, network.services)),
    section("Paths between nodes", networkPaths(app, network)),
  ];
}

/** Failing probes between the nodes that run tasks on a network. */
function networkPaths(app, network) {
  const ids = new Set(network.services.flatMap((id) => app.cluster.tasksOf("service", id).map((task) => task.node)));
  const nodes = [...ids].map((id) => app.cluster.get("nodes", id)).filter(Boolean);
  const names = new Set(nodes.map((node) => node.name));
  const wrong = failing(nodes).filter(({ to }) => names.has(to));
  if (wrong.length === 0) return h("p", { class: "quiet" }, nodes.length < 2 ? `${count(nodes.length, "node")} with tasks on this network.` : `All paths work between the ${nodes.length} nodes with tasks on this network.`);
  return h("ul", { class: "plain failures" }, wrong.map(({ from, to, check, port }) => h("li", { key: `${from.id} ${to} ${check}` }, link(app, "nodes", from.id), ` → ${to}`, h("span", { class: "quiet" }, ` ${port} (${check})`))));
}

function serviceList(app, ids) {
  const services = ids.map((id) => app.cluster.get("services", id)).filter(Boolean).sort((a, b) => compareNames(a.name, b.name));
  if (services.length === 0) return h("p", { class: "quiet" }, "None");
  return h("ul", { class: "users" }, services.map((service) =>
    h("li", { key: service.id }, serviceGlyph(service), link(app, "services", service.id), replicas(service), serviceState(service))));
}

function stackPanel(app, stack) {
  const services = stack.services.map((id) => app.cluster.get("services", id)).filter(Boolean);
  const networks = app.cluster.all("networks").filter((network) => network.stack === stack.name).map(({ id }) => id);
  const earlier = stack.revisions?.slice(1).find(({ state }) => !state.startsWith("failed"));
  return [
    facts(
      ["State", stackState(services)],
      ["Revision", stack.revision !== null ? String(stack.revision) : app.past === null ? "not recorded" : "not known"],
      networks.length > 0 && ["Networks", links(app, "networks", networks)],
    ),
    section("Services", serviceList(app, stack.services)),
    section("Revisions", !stack.revisions?.length
      ? h("p", { class: "quiet" }, app.past === null ? "None. Only skep stack deploy records revisions." : "An earlier state of the cluster has no revisions. Go back to now to see them.")
      : h("ol", { class: "history" }, stack.revisions.map((revision) => h("li", { key: revision.number, class: revision.state.startsWith("failed") ? "bad" : "" },
          h("time", {}, clockTime(revision.created_at, app.now)),
          h("b", {}, String(revision.number)),
          h("span", {}, deployState(revision), " ", revision.changes || "no changes"),
          revision.state.startsWith("failed") && h("p", {}, revision.state))))),
    earlier && section("Return to a revision", command(app, `skep stack rollback ${stack.name} --to ${earlier.number}`)),
  ];
}

function volumePanel(app, volume) {
  return facts(
    ["State", volume.state],
    volume.reason && ["Reason", volume.reason],
    ["Driver", h("code", {}, volume.driver)],
    ["Availability", volume.availability],
    ["Nodes", links(app, "nodes", volume.nodes)],
    ["ID", h("code", {}, volume.id)],
  );
}

/** A secret or config: its versions, and how many running tasks of each service have it. */
function secretPanel(app, row) {
  const labels = Object.entries(row.labels ?? {});
  const versions = families(app.cluster.all(app.route.kind)).get(familyOf(row));
  const uptake = row.services.map((id) => app.cluster.get("services", id)).filter(Boolean).map((service) => {
    const tasks = app.cluster.tasksOf("service", service.id).filter((task) => phase(task) === "running");
    return h("li", { key: service.id }, serviceGlyph(service), link(app, "services", service.id), h("span", {}, `${tasks.filter((task) => task.current).length} of ${count(tasks.length, "running task")}`));
  });
  return [
    facts(
      ["Created", [ago(app, row.created_at), ", ", h("span", { class: "quiet" }, clockTime(row.created_at, app.now))]],
      row.updated_at !== row.created_at && ["Updated", ago(app, row.updated_at)],
      row.stack && ["Stack", link(app, "stacks", row.stack)],
      labels.length > 0 && ["Labels", labels.map(([name, value]) => h("code", { class: "label" }, value === "" ? name : `${name}=${value}`))],
      ["ID", h("code", {}, row.id)],
    ),
    versions.length > 1 && section("Versions", h("ul", { class: "users" }, versions.map((version) =>
      h("li", { key: version.id, "aria-current": version.id === row.id ? "true" : undefined }, h("a", { href: app.href(app.route.kind, version.id) }, version.name), uptakeText(app, version), h("span", { class: "quiet" }, ago(app, version.created_at)))))),
    section("Used by", uptake.length > 0 ? h("ul", { class: "users" }, uptake) : h("p", { class: "quiet" }, "No service.")),
    h("p", { class: "quiet small" }, "The data is never sent to this page."),
  ];
}
