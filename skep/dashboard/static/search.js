/** Search in all fields of all objects.  No DOM here. */

import { KINDS, phase } from "./cluster.js";

/** The searched fields of each kind, in addition to name and ID. */
const FIELDS = {
  nodes: (row) => [row.address, row.role, row.state, row.availability, row.engine, row.reason, ...labels(row)],
  services: (row) => [row.image, row.stack, row.mode, row.state, row.reason, row.update?.message, ...row.ports.flatMap((port) => [`:${port.published}`, String(port.published)])],
  tasks: (row, cluster) => [row.image, row.state, phase(row), row.error, row.message, cluster.name("nodes", row.node)],
  networks: (row) => [row.driver, row.stack, ...row.subnets, row.encrypted ? "encrypted" : ""],
  stacks: () => [],
  volumes: (row) => [row.driver, row.state, row.reason],
  secrets: (row) => [row.stack, ...labels(row)],
  configs: (row) => [row.stack, ...labels(row)],
};

const labels = (row) => Object.entries(row.labels ?? {}).map(([name, value]) => `${name}=${value}`);

/** Finds rows that have every word of the query.  Names that start with it come first. */
export function search(cluster, query, max = 40) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  if (words.length === 0) return [];
  const found = [];
  for (const kind of KINDS) {
    for (const row of cluster.all(kind)) {
      const name = kind === "tasks" ? cluster.taskName(row) : row.name;
      const rank = rankOf(words, name, row, () => FIELDS[kind](row, cluster));
      if (rank !== null) found.push({ rank, kind, id: row.id, name, order: found.length });
    }
  }
  found.sort((a, b) => a.rank.score - b.rank.score || KINDS.indexOf(a.kind) - KINDS.indexOf(b.kind) || a.order - b.order);
  return found.slice(0, max).map(({ rank, kind, id, name }) => ({ kind, id, name, because: rank.because }));
}

/** `{score, because}` or null.  Lower scores are better.  `because` is the text that was found, if not the name. */
function rankOf(words, name, row, fields) {
  let score = 0;
  let because = "";
  let others = null;
  for (const word of words) {
    const at = name.toLowerCase().indexOf(word);
    if (at === 0) score += name.length === word.length ? 0 : 1;
    else if (at > 0) score += 2;
    else if (row.id.toLowerCase().startsWith(word)) score += 2;
    else {
      others ??= fields().filter(Boolean);
      const field = others.find((text) => text.toLowerCase().includes(word));
      if (field === undefined) return null;
      score += 4;
      because = field;
    }
  }
  return { score, because };
}
