/** Requests of the Engine API, relative to the page.  Each has a deadline, and its errors have the cluster's message. */

const DEADLINE_S = 20;

/** A response with an error status, or none (status 0). */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(`../${path}`, { ...options, signal: AbortSignal.timeout(DEADLINE_S * 1000) });
  } catch (error) {
    throw new ApiError(0, error.name === "TimeoutError" ? `no response within ${DEADLINE_S} s` : "no connection");
  }
  const text = await response.text();
  let body = null;
  try {
    body = text ? JSON.parse(text) : null;
  } catch {
    body = null;
  }
  if (!response.ok) throw new ApiError(response.status, body?.message ?? `the request failed with status ${response.status}`);
  return body;
}

/** The JSON at `path`. */
export const get = (path) => request(path, { method: "GET" });

/** Sends `body` as JSON and returns the JSON of the answer. */
export const post = (path, body) =>
  request(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: body === undefined ? undefined : JSON.stringify(body),
  });

/** Calls `take(chunk, type)` with each chunk (Uint8Array) of a stream and its content type, until it ends or `signal` aborts. */
export async function stream(path, signal, take) {
  const response = await fetch(`../${path}`, { signal });
  const type = response.headers.get("Content-Type") ?? "";
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    throw new ApiError(response.status, body?.message ?? `the request failed with status ${response.status}`);
  }
  const reader = response.body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    take(value, type);
  }
}
