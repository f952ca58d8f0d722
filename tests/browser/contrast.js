/**
 * Measures what a page shows: text against its background, and shapes that carry a meaning against what is around them.
 *
 * `contrastFindings()` returns `[{what, ratio, least}]` of everything below the ratios of WCAG 2.2 (1.4.3 and 1.4.11).
 * `contrastCounts()` returns how much was measured, so that a test can tell a clean page from an empty one.
 */
(() => {
  const TEXT = 4.5;
  const LARGE_TEXT = 3;
  const GRAPHICS = 3;
  /** Shapes without a meaning of their own, and controls that WCAG exempts. */
  const EXEMPT = ".hole, .grid, .later, .unseen, :disabled, :disabled *, .skip:not(:focus), .terminal *";
  const counts = { text: 0, graphics: 0, drawn: 0 };
  const drawn = new Map();

  const pixel = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const known = new Map();

  /** `[red, green, blue, alpha]`, 0 to 1, of any CSS color. */
  function parsed(color) {
    let found = known.get(color);
    if (found === undefined) {
      pixel.clearRect(0, 0, 1, 1);
      pixel.fillStyle = color;
      pixel.fillRect(0, 0, 1, 1);
      found = [...pixel.getImageData(0, 0, 1, 1).data].map((value) => value / 255);
      known.set(color, found);
    }
    return found;
  }

  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const faded = (color, alpha) => [color[0], color[1], color[2], color[3] * alpha];

  function luminance(color) {
    const [red, green, blue] = color.map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  }

  function ratio(a, b) {
    const [light, dark] = [luminance(a), luminance(b)].sort((x, y) => y - x);
    return (light + 0.05) / (dark + 0.05);
  }

  /** The color behind an element: of itself and its ancestors, up to the first that is opaque. */
  function behind(element) {
    const layers = [];
    for (let one = element; one; one = one.parentElement) {
      const color = parsed(getComputedStyle(one).backgroundColor);
      layers.push(color);
      if (color[3] === 1) break;
    }
    return layers.reduceRight((below, top) => over(top, below), parsed("white"));
  }

  function opacity(element) {
    let product = 1;
    for (let one = element; one; one = one.parentElement) product *= Number(getComputedStyle(one).opacity);
    return product;
  }

  const nameOf = (element) => `${element.tagName.toLowerCase()}.${element.getAttribute("class") ?? ""} in ${element.parentElement?.tagName.toLowerCase()}.${element.parentElement?.getAttribute("class") ?? ""} ${(element.textContent ?? "").trim().slice(0, 30)}`;

  globalThis.contrastFindings = () => {
    const found = [];
    const compare = (kind, what, color, ground, least) => {
      counts[kind] += 1;
      const measured = ratio(over(color, ground), ground);
      if (measured < least) found.push({ what, ratio: Math.round(measured * 100) / 100, least });
    };
    for (const element of document.querySelectorAll("body *, dialog *")) {
      if (element.matches(EXEMPT) || element.closest("noscript") || !element.checkVisibility({ visibilityProperty: true })) continue;
      const style = getComputedStyle(element);
      const shown = opacity(element);
      const hasText = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.nodeValue.trim() !== "");
      if (hasText) {
        const size = Number.parseFloat(style.fontSize);
        const isLarge = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
        compare("text", nameOf(element), faded(parsed(style.color), shown), behind(element), isLarge ? LARGE_TEXT : TEXT);
      }
      if (element.placeholder) {
        compare("text", `placeholder of ${nameOf(element)}`, faded(parsed(getComputedStyle(element, "::placeholder").color), shown), behind(element), TEXT);
      }
      graphics(element, style, shown, (...rest) => compare("graphics", ...rest, GRAPHICS));
    }
    canvas((kind, ...rest) => compare("drawn", ...rest, kind === "text" ? TEXT : GRAPHICS));
    return found;
  };

  function graphics(element, style, shown, compare) {
    if (element instanceof SVGGeometryElement) {
      const ground = behind(element.ownerSVGElement);
      for (const name of ["fill", "stroke"]) {
        if (style[name] !== "none") compare(`${name} of ${nameOf(element)}`, faded(parsed(style[name]), shown), ground);
      }
    }
    // Part of a meter against its track, the dot of the connection.
    if (element.tagName === "I" && (element.parentElement.matches(".meter, .live"))) {
      if (element.clientWidth > 0) compare(nameOf(element), parsed(style.backgroundColor), behind(element.parentElement));
    }
    if (element.matches("input:not([type=range], [type=hidden]), select") && Number.parseFloat(style.borderTopWidth) > 0) {
      compare(`border of ${nameOf(element)}`, parsed(style.borderTopColor), behind(element.parentElement));
    }
    if (element.matches(".notes li, .paths li, .events li.bad, .events li.warn")) {
      compare(`mark of ${nameOf(element)}`, parsed(style.borderLeftColor), behind(element));
    }
    if (element.matches(".tabs [aria-current]")) compare(`mark of ${nameOf(element)}`, parsed(style.borderBottomColor), behind(element));
    if (element.matches(".levels li")) {
      compare(`key of ${nameOf(element)}`, parsed(getComputedStyle(element, "::before").backgroundColor), behind(element));
    }
  }

  /** The hive: its strokes, fills and texts against the two grounds that they may lie on, names in cells against cells. */
  function canvas(compare) {
    const root = getComputedStyle(document.documentElement);
    const ink = (name) => parsed(root.getPropertyValue(`--${name}`).trim());
    const grounds = [ink("surface"), ink("ground")];
    const isGround = (color) => grounds.some((ground) => ground.every((value, i) => Math.abs(value - color[i]) < 0.002));
    for (const { kind, style, alpha } of drawn.values()) {
      const color = faded(parsed(style), alpha);
      // The pale red behind a crossed cell is decoration: its border and its cross are measured.
      if (isGround(color) || alpha < 0.16) continue;
      const inCell = kind === "text" && style === pixelStyle(root.getPropertyValue("--on-cell").trim());
      for (const ground of inCell ? [ink("run")] : grounds) compare(kind, `${kind} ${style} on the hive`, color, ground);
    }
  }

  function pixelStyle(color) {
    pixel.fillStyle = color;
    return pixel.fillStyle;
  }

  globalThis.contrastCounts = () => counts;
  globalThis.contrastForget = () => drawn.clear();

  const prototype = CanvasRenderingContext2D.prototype;
  for (const [method, kind, property] of [["fill", "shape", "fillStyle"], ["stroke", "shape", "strokeStyle"], ["fillText", "text", "fillStyle"]]) {
    const original = prototype[method];
    prototype[method] = function draw(...words) {
      if (this !== pixel) drawn.set(`${kind} ${this[property]} ${this.globalAlpha}`, { kind, style: this[property], alpha: this.globalAlpha });
      return original.apply(this, words);
    };
  }
})();
