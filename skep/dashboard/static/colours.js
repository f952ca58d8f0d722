/** A colour for each service that stays its own.  No DOM here. */

/** Hues (OKLCH) that people tell apart; reds are left to failures. */
const HUES = [72, 240, 150, 305, 195, 110, 270, 335, 172, 220, 130, 92];
const LEVELS = 3;

/** A number that depends on the text alone (FNV-1a). */
export function hash(text) {
  let value = 0x811c9dc5;
  for (let i = 0; i < text.length; i += 1) value = Math.imul(value ^ text.charCodeAt(i), 0x01000193) >>> 0;
  return value;
}

/** Which colour each service has.  A service keeps its colour while others come and go. */
export class Colours {
  #slots = new Map();
  #users = new Array(HUES.length * LEVELS).fill(0);

  /** Gives colours to the services (`{id, name}`), in the order of their names; those that are gone give theirs back. */
  assign(services) {
    const present = new Set(services.map((service) => service.id));
    for (const [id, slot] of this.#slots) {
      if (!present.has(id)) {
        this.#users[slot] -= 1;
        this.#slots.delete(id);
      }
    }
    for (const { id, name } of services) {
      if (this.#slots.has(id)) continue;
      const slot = this.#free(hash(name) % HUES.length);
      this.#users[slot] += 1;
      this.#slots.set(id, slot);
    }
  }

  /** The least used slot, looking from `start` through all hues of the first level, then of the next. */
  #free(start) {
    const least = Math.min(...this.#users);
    for (let level = 0; level < LEVELS; level += 1) {
      for (let step = 0; step < HUES.length; step += 1) {
        const slot = level * HUES.length + ((start + step) % HUES.length);
        if (this.#users[slot] === least) return slot;
      }
    }
    return start;
  }

  /** The colour of a service in a theme, as CSS; grey for one that is not known. */
  of(id, dark) {
    const slot = this.#slots.get(id);
    const level = slot === undefined ? 0 : Math.floor(slot / HUES.length);
    const lightness = dark ? [0.76, 0.62, 0.86][level] : [0.72, 0.61, 0.82][level];
    if (slot === undefined) return `oklch(${lightness} 0.01 80)`;
    return `oklch(${lightness} ${[0.125, 0.12, 0.09][level]} ${HUES[slot % HUES.length]})`;
  }
}
