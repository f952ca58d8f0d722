/** The login page: applies the theme, and forwards a browser that has a session. */

import { sessionPath, savedTheme } from "./session.js";

const theme = savedTheme();
const isDark = theme === "dark" || (theme === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);
document.documentElement.dataset.theme = isDark ? "dark" : "light";

// The cookie belongs to one path, which another tab has saved.
const path = sessionPath();
if (path !== "" && location.pathname === "/") {
  const answer = await fetch(`${path}skep/ui/session`).catch(() => null);
  if (answer?.ok) location.replace(`${path}ui/`);
}
