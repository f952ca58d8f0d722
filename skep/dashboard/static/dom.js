/**
 * Elements as values: `h()` describes them, `patch()` changes the page to match.
 *
 * All text is cleaned and becomes text nodes.  Nothing is ever parsed as HTML.
 */

import { clean } from "./text.js";

const SVG = new Set(["svg", "path", "circle", "rect", "line", "g", "polygon", "polyline"]);
const PROPERTIES = new Set(["value", "checked", "disabled", "hidden", "open", "selected"]);
const CLEANED = new Set(["title", "placeholder"]);

/** A description of `<tag ...props>children</tag>`; `key` identifies siblings, `on*` are listeners, `vars` are CSS variables. */
export function h(tag, props, ...children) {
  return { tag, props: props ?? {}, children: flat(children) };
}

/** A description of an existing element that updates itself, such as a canvas or a terminal. */
export function own(element, key) {
  return { element, props: { key } };
}

function flat(children, into = []) {
  for (const child of children) {
    if (Array.isArray(child)) flat(child, into);
    else if (child !== null && child !== undefined && child !== false && child !== true) {
      into.push(typeof child === "object" ? child : { text: clean(child), props: {} });
    }
  }
  return into;
}

/** Changes the children of `parent` to match `wanted`, keeping elements that stay. */
export function patch(parent, ...wanted) {
  patchChildren(parent, flat(wanted));
}

function patchChildren(parent, wanted) {
  const before = parent.skepChildren ?? [];
  const keyed = new Map();
  for (const old of before) if (old.vnode.props.key !== undefined) keyed.set(old.vnode.props.key, old);
  const taken = new Set();
  let unkeyed = 0;
  const after = wanted.map((vnode) => {
    let old;
    if (vnode.props.key !== undefined) old = keyed.get(vnode.props.key);
    else {
      while (unkeyed < before.length && before[unkeyed].vnode.props.key !== undefined) unkeyed += 1;
      old = before[unkeyed];
      unkeyed += 1;
    }
    if (old !== undefined && !taken.has(old) && isSame(old.vnode, vnode)) {
      taken.add(old);
      update(old.element, old.vnode, vnode);
      return { element: old.element, vnode };
    }
    return { element: create(vnode), vnode };
  });
  for (const old of before) if (!taken.has(old)) old.element.remove();
  let next = null;
  for (let i = after.length - 1; i >= 0; i -= 1) {
    const { element } = after[i];
    // An element in its place is not moved, which would lose its focus and scroll position.
    if (element.parentNode !== parent || element.nextSibling !== next) parent.insertBefore(element, next);
    next = element;
  }
  parent.skepChildren = after;
}

function isSame(a, b) {
  return a.tag === b.tag && a.element === b.element && (a.text === undefined) === (b.text === undefined);
}

function create(vnode) {
  if (vnode.element !== undefined) return vnode.element;
  if (vnode.text !== undefined) return document.createTextNode(vnode.text);
  const element = SVG.has(vnode.tag)
    ? document.createElementNS("http://www.w3.org/2000/svg", vnode.tag)
    : document.createElement(vnode.tag);
  setProps(element, {}, vnode.props);
  patchChildren(element, vnode.children);
  // After the children, because the value of a select is one of its options.
  if (vnode.props.value !== undefined) element.value = vnode.props.value;
  return element;
}

function update(element, old, vnode) {
  if (vnode.element !== undefined) return;
  if (vnode.text !== undefined) {
    if (old.text !== vnode.text) element.nodeValue = vnode.text;
    return;
  }
  setProps(element, old.props, vnode.props);
  patchChildren(element, vnode.children);
}

function setProps(element, old, props) {
  for (const name of Object.keys(old)) if (!(name in props)) setProp(element, name, old[name], undefined);
  for (const [name, value] of Object.entries(props)) if (old[name] !== value) setProp(element, name, old[name], value);
}

function setProp(element, name, before, value) {
  if (name === "key") return;
  if (name.startsWith("on")) {
    const event = name.slice(2);
    if (before) element.removeEventListener(event, before);
    if (value) element.addEventListener(event, value);
  } else if (name === "vars") {
    for (const [variable, text] of Object.entries(value ?? {})) element.style.setProperty(variable, text);
  } else if (PROPERTIES.has(name)) {
    if (element[name] !== (value ?? "")) element[name] = value ?? "";
  } else if (value === undefined || value === null || value === false) {
    element.removeAttribute(name);
  } else {
    const text = value === true ? "" : String(value);
    element.setAttribute(name, CLEANED.has(name) || name.startsWith("aria-") ? clean(text) : text);
  }
}
