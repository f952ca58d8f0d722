/** Versions of secrets and configs, and how many tasks have each.  No DOM here. */

import { phase } from "./cluster.js";
import { compareNames } from "./text.js";

const OF = "skep.rotation.of";

/** The name of the first version of a secret or config. */
export const familyOf = (row) => row.labels?.[OF] || row.name;

/** The versions of each name, the newest first: `{name: rows}`. */
export function families(rows) {
  const found = new Map();
  for (const row of rows) found.set(familyOf(row), [...(found.get(familyOf(row)) ?? []), row]);
  for (const versions of found.values()) versions.sort((a, b) => b.created_at - a.created_at || compareNames(b.name, a.name));
  return found;
}

/**
 * How many running tasks of the services that name a version have it, `{have, wait}`.  A task of an earlier spec has it
 * after an update replaced the task.
 */
export function uptake(cluster, row) {
  let have = 0;
  let wait = 0;
  for (const id of row.services) {
    for (const task of cluster.tasksOf("service", id)) {
      if (phase(task) !== "running") continue;
      if (task.current) have += 1;
      else wait += 1;
    }
  }
  return { have, wait };
}
