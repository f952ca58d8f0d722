/** Published ports in words.  No DOM here. */

const SHOWN_MAX = 3;

/** `8080→80` of a port on every node, `8080→80 (host)` of one on the nodes of its tasks. */
export function portText({ published, target, protocol, mode }, given = []) {
  const end = `${target}${protocol === "tcp" ? "" : `/${protocol}`}`;
  if (mode !== "host") return `${published || "any"}→${end}`;
  if (published) return `${published}→${end} (host)`;
  const numbers = [...new Set(given)].sort((a, b) => a - b);
  if (numbers.length === 0) return `→${end} (host)`;
  const words = numbers.length > SHOWN_MAX ? `${numbers[0]}–${numbers.at(-1)}` : numbers.join(", ");
  return `${words}→${end} (host)`;
}

/** The ports of a service.  Ports that each node chooses are taken from its tasks. */
export function portsText(ports, tasks = []) {
  const given = (port) =>
    tasks.flatMap((task) => task.ports ?? []).filter(({ target, protocol }) => target === port.target && protocol === port.protocol).map(({ published }) => published);
  return ports.map((port) => portText(port, port.mode === "host" && !port.published ? given(port) : [])).join(" ");
}
