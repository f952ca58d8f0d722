/** The session of the user.  With `skep ui` there is no login. */

import { get, post } from "./api.js";

const PATH = "skep-session";

/** The path of the session that a tab of this browser opened last, or "". */
export function sessionPath() {
  const path = localStorage.getItem(PATH) ?? "";
  return /^\/[0-9a-z]+\/$/.test(path) ? path : "";
}

export const savedTheme = () => localStorage.getItem("skep-theme") ?? "auto";

/** `{user, roles, by_login}` of this page's session. */
export async function readSession() {
  const session = await get("skep/ui/session");
  if (session.by_login) localStorage.setItem(PATH, new URL("../", location.href).pathname);
  return session;
}

/** Ends the session and shows the login page. */
export async function logOut() {
  try {
    await post("skep/ui/logout");
  } finally {
    localStorage.removeItem(PATH);
    location.replace("/");
  }
}
