/** The login page: in the colours that were chosen, and past itself while this browser's session lasts. */

import { sessionPath, savedTheme } from "./session.js";

const theme = savedTheme();
const isDark = theme === "dark" || (theme === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);
document.documentElement.dataset.theme = isDark ? "dark" : "light";

// The cookie is for one path, which another tab has left here.
const path = sessionPath();
if (path !== "" && location.pathname === "/") {
  const answer = await fetch(`${path}skep/ui/session`).catch(() => null);
  if (answer?.ok) location.replace(`${path}ui/`);
}
