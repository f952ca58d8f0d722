/** Dialogs of the browser, which keep the focus and close with Escape. */

import { h, patch } from "./dom.js";

/**
 * Opens a dialog with the content of `show(redraw, close)`.  `redraw()` calls it again.
 * Returns the element, which is removed when it closes.
 */
export function openDialog(label, kind, show) {
  const element = document.createElement("dialog");
  element.className = kind;
  element.setAttribute("aria-label", label);
  const close = () => element.close();
  const redraw = () => patch(element, ...[show(redraw, close)].flat());
  element.addEventListener("close", () => element.remove());
  element.addEventListener("click", (event) => {
    if (event.target === element) close();
  });
  redraw();
  document.documentElement.append(element);
  element.showModal();
  return element;
}

/** A heading with a close button. */
export function dialogHead(title, close) {
  return h("div", { class: "panel-head" }, h("h2", {}, title), h("button", { type: "button", class: "close", onclick: close, title: "Close (Esc)", "aria-label": "Close" }, "×"));
}
