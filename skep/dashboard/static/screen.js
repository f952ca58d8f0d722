/** What a terminal shows: the part of xterm's language that shells, editors and `top` use.  No DOM here. */

const ROWS_MAX = 200;
const COLUMNS_MAX = 400;
const PARAMETERS_MAX = 32;
const SEQUENCE_MAX = 4096;

/** The look of a cell: colours are numbers of the 256, or "" for the terminal's own. */
const PLAIN = Object.freeze({ fg: "", bg: "", bold: false, underline: false, inverse: false });

const isSame = (a, b) => a === b || (a.fg === b.fg && a.bg === b.bg && a.bold === b.bold && a.underline === b.underline && a.inverse === b.inverse);

/** A grid of characters.  `write(text)` takes what the program sends; `reply(text)` is called for what it asks. */
export class Screen {
  rows;
  columns;
  cursor = { row: 0, column: 0, isShown: true };
  #lines;
  #other = null;
  #look = PLAIN;
  #saved = { row: 0, column: 0, look: PLAIN };
  #top = 0;
  #bottom;
  #wrapsNext = false;
  #pending = "";
  #hasApplicationKeys = false;
  #reply;

  constructor(rows, columns, reply = () => {}) {
    this.rows = rows;
    this.columns = columns;
    this.#bottom = rows - 1;
    this.#reply = reply;
    this.#lines = Array.from({ length: rows }, () => this.#blank());
  }

  /** Whether cursor keys are to be sent as `ESC O x`. */
  get hasApplicationKeys() {
    return this.#hasApplicationKeys;
  }

  /** The runs of one look of a row: `[{text, look}]`. */
  runs(row) {
    const found = [];
    for (const { character, look } of this.#lines[row]) {
      const last = found.at(-1);
      if (last && isSame(last.look, look)) last.text += character;
      else found.push({ text: character, look });
    }
    return found;
  }

  /** All text, without blanks at the ends of lines. */
  text() {
    return this.#lines.map((line) => line.map(({ character }) => character).join("").trimEnd()).join("\n").trimEnd();
  }

  resize(rows, columns) {
    this.rows = Math.min(ROWS_MAX, Math.max(2, rows));
    this.columns = Math.min(COLUMNS_MAX, Math.max(2, columns));
    const fitted = (lines) => {
      const kept = lines.slice(Math.max(0, Math.min(lines.length - this.rows, this.cursor.row - this.rows + 1))).slice(0, this.rows);
      while (kept.length < this.rows) kept.push(this.#blank());
      return kept.map((line) => [...line.slice(0, this.columns), ...this.#blank(Math.max(0, this.columns - line.length))]);
    };
    this.#lines = fitted(this.#lines);
    if (this.#other) this.#other = fitted(this.#other);
    this.#top = 0;
    this.#bottom = this.rows - 1;
    this.#go(this.cursor.row, this.cursor.column);
  }

  write(text) {
    const all = this.#pending + text;
    this.#pending = "";
    for (let i = 0; i < all.length; ) {
      if (all[i] === "\u001b") {
        const length = this.#escape(all.slice(i, i + SEQUENCE_MAX));
        if (length === 0) {
          // The rest of the sequence comes with the next piece, unless it never ends.
          if (all.length - i < SEQUENCE_MAX) this.#pending = all.slice(i);
          return;
        }
        i += length;
      } else {
        const character = String.fromCodePoint(all.codePointAt(i));
        this.#put(character);
        i += character.length;
      }
    }
  }

  #blank(length = this.columns) {
    return Array.from({ length }, () => ({ character: " ", look: PLAIN }));
  }

  #put(character) {
    switch (character) {
      case "\n": case "\u000b": case "\u000c": return this.#feed();
      case "\r": return this.#go(this.cursor.row, 0);
      case "\b": return this.#go(this.cursor.row, this.cursor.column - 1);
      case "\t": return this.#go(this.cursor.row, Math.min(this.columns - 1, (Math.floor(this.cursor.column / 8) + 1) * 8));
      default:
    }
    if (character < " " || character === "\u007f") return undefined;
    if (this.#wrapsNext) {
      this.#go(this.cursor.row, 0);
      this.#feed();
    }
    this.#lines[this.cursor.row][this.cursor.column] = { character, look: this.#look };
    if (this.cursor.column === this.columns - 1) this.#wrapsNext = true;
    else this.cursor.column += 1;
    return undefined;
  }

  #go(row, column) {
    this.#wrapsNext = false;
    this.cursor.row = Math.min(this.rows - 1, Math.max(0, row));
    this.cursor.column = Math.min(this.columns - 1, Math.max(0, column));
  }

  #feed() {
    this.#wrapsNext = false;
    if (this.cursor.row === this.#bottom) this.#scroll(1);
    else this.cursor.row = Math.min(this.rows - 1, this.cursor.row + 1);
  }

  /** Moves the lines of the region up by `by`, or down. */
  #scroll(by, top = this.#top) {
    const count = Math.min(Math.abs(by), this.#bottom - top + 1);
    for (let i = 0; i < count; i += 1) {
      if (by > 0) {
        this.#lines.splice(top, 1);
        this.#lines.splice(this.#bottom, 0, this.#blank());
      } else {
        this.#lines.splice(this.#bottom, 1);
        this.#lines.splice(top, 0, this.#blank());
      }
    }
  }

  /** Carries out the sequence at the beginning of `text` and gives its length; 0: it is not complete. */
  #escape(text) {
    if (text.length < 2) return 0;
    if (text[1] === "[") {
      const found = /^\u001b\[([<-?]?)([0-9;:]*)[ -/]*([@-~])/.exec(text);
      if (found) {
        this.#control(found[1], found[2].split(/[;:]/).slice(0, PARAMETERS_MAX).map((number) => (number === "" ? -1 : Number(number))), found[3]);
        return found[0].length;
      }
      // Something that belongs to no sequence ends it.
      return /^\u001b\[[0-?]*[ -/]*$/.test(text) ? 0 : 2;
    }
    if (text[1] === "]" || text[1] === "P" || text[1] === "_" || text[1] === "^") {
      const end = /\u0007|\u001b\\/.exec(text.slice(2));
      return end ? 2 + end.index + end[0].length : text.length >= SEQUENCE_MAX ? text.length : 0;
    }
    if ("()*+#%".includes(text[1])) return text.length < 3 ? 0 : 3;
    this.#short(text[1]);
    return 2;
  }

  #short(letter) {
    if (letter === "7") this.#saved = { ...this.cursor, look: this.#look };
    else if (letter === "8") this.#restore();
    else if (letter === "D") this.#feed();
    else if (letter === "E") {
      this.#feed();
      this.#go(this.cursor.row, 0);
    } else if (letter === "M") {
      if (this.cursor.row === this.#top) this.#scroll(-1);
      else this.#go(this.cursor.row - 1, this.cursor.column);
    } else if (letter === "c") {
      this.#look = PLAIN;
      this.#lines = Array.from({ length: this.rows }, () => this.#blank());
      this.#go(0, 0);
    }
  }

  #restore() {
    this.#look = this.#saved.look;
    this.#go(this.#saved.row, this.#saved.column);
  }

  #control(mark, given, letter) {
    const number = (i, otherwise = 1) => (given[i] === undefined || given[i] <= 0 ? otherwise : given[i]);
    const { row, column } = this.cursor;
    if (mark === "?") {
      if (letter === "h" || letter === "l") for (const mode of given) this.#mode(mode, letter === "h");
      return;
    }
    if (mark !== "") return;
    switch (letter) {
      case "A": return this.#go(row - number(0), column);
      case "B": case "e": return this.#go(row + number(0), column);
      case "C": case "a": return this.#go(row, column + number(0));
      case "D": return this.#go(row, column - number(0));
      case "E": return this.#go(row + number(0), 0);
      case "F": return this.#go(row - number(0), 0);
      case "G": case "`": return this.#go(row, number(0) - 1);
      case "H": case "f": return this.#go(number(0) - 1, number(1) - 1);
      case "d": return this.#go(number(0) - 1, column);
      case "J": return this.#eraseScreen(number(0, 0));
      case "K": return this.#eraseLine(number(0, 0));
      case "L": return row >= this.#top && row <= this.#bottom ? this.#scroll(-number(0), row) : undefined;
      case "M": return row >= this.#top && row <= this.#bottom ? this.#scroll(number(0), row) : undefined;
      case "P": return this.#shift(-number(0));
      case "@": return this.#shift(number(0));
      case "X": return this.#fill(row, column, column + number(0));
      case "S": return this.#scroll(number(0));
      case "T": return this.#scroll(-number(0));
      case "m": return this.#style(given);
      case "n": return given[0] === 6 ? this.#reply(`\u001b[${row + 1};${column + 1}R`) : undefined;
      case "c": return this.#reply("\u001b[?6c");
      case "r":
        this.#top = Math.min(this.rows - 1, number(0) - 1);
        this.#bottom = Math.max(this.#top, Math.min(this.rows, number(1, this.rows)) - 1);
        return this.#go(0, 0);
      case "s": this.#saved = { ...this.cursor, look: this.#look }; return undefined;
      case "u": return this.#restore();
      default: return undefined;
    }
  }

  #mode(mode, isOn) {
    if (mode === 1) this.#hasApplicationKeys = isOn;
    else if (mode === 25) this.cursor.isShown = isOn;
    else if ([47, 1047, 1049].includes(mode) && isOn !== (this.#other !== null)) {
      if (isOn) {
        this.#saved = { ...this.cursor, look: this.#look };
        this.#other = this.#lines;
        this.#lines = Array.from({ length: this.rows }, () => this.#blank());
      } else {
        this.#lines = this.#other;
        this.#other = null;
        this.#restore();
      }
    }
  }

  #fill(row, from, to) {
    for (let i = from; i < Math.min(to, this.columns); i += 1) this.#lines[row][i] = { character: " ", look: { ...PLAIN, bg: this.#look.bg } };
  }

  #eraseLine(how) {
    const { row, column } = this.cursor;
    this.#fill(row, how === 0 ? column : 0, how === 1 ? column + 1 : this.columns);
  }

  #eraseScreen(how) {
    const { row } = this.cursor;
    if (how < 2) this.#eraseLine(how);
    for (let i = 0; i < this.rows; i += 1) if (how >= 2 || (how === 0 ? i > row : i < row)) this.#fill(i, 0, this.columns);
  }

  /** Inserts blanks at the cursor, or takes characters out. */
  #shift(by) {
    const line = this.#lines[this.cursor.row];
    const count = Math.min(Math.abs(by), this.columns - this.cursor.column);
    if (by > 0) line.splice(this.cursor.column, 0, ...this.#blank(count));
    else {
      line.splice(this.cursor.column, count);
      line.push(...this.#blank(count));
    }
    line.length = this.columns;
  }

  #style(given) {
    for (let i = 0; i < given.length; i += 1) {
      const code = given[i];
      if (code <= 0) this.#look = PLAIN;
      else if (code === 1) this.#look = { ...this.#look, bold: true };
      else if (code === 4) this.#look = { ...this.#look, underline: true };
      else if (code === 7) this.#look = { ...this.#look, inverse: true };
      else if (code === 22) this.#look = { ...this.#look, bold: false };
      else if (code === 24) this.#look = { ...this.#look, underline: false };
      else if (code === 27) this.#look = { ...this.#look, inverse: false };
      else if (code === 38 || code === 48) {
        const name = code === 38 ? "fg" : "bg";
        if (given[i + 1] === 5) this.#look = { ...this.#look, [name]: given[i + 2] & 255 };
        else if (given[i + 1] === 2) this.#look = { ...this.#look, [name]: nearest(given[i + 2], given[i + 3], given[i + 4]) };
        i += given[i + 1] === 5 ? 2 : 4;
      } else if (code >= 30 && code <= 37) this.#look = { ...this.#look, fg: code - 30 };
      else if (code >= 40 && code <= 47) this.#look = { ...this.#look, bg: code - 40 };
      else if (code === 39) this.#look = { ...this.#look, fg: "" };
      else if (code === 49) this.#look = { ...this.#look, bg: "" };
      else if (code >= 90 && code <= 97) this.#look = { ...this.#look, fg: code - 82 };
      else if (code >= 100 && code <= 107) this.#look = { ...this.#look, bg: code - 92 };
    }
  }
}

/** The number of the colour cube that is nearest to a colour. */
function nearest(red, green, blue) {
  const step = (value) => Math.min(5, Math.max(0, Math.round(((value ?? 0) / 255) * 5)));
  return 16 + 36 * step(red) + 6 * step(green) + step(blue);
}

const SIXTEEN = ["#2b2820", "#e06c60", "#82c99a", "#e5b567", "#6fa8dc", "#c58fd6", "#5fc1c1", "#d8d2c4", "#7a7364", "#ff9187", "#a5e2b8", "#f7cf85", "#93c4f0", "#dfb0ee", "#87dede", "#fffaf0"];

/** One of the 256 colours as CSS. */
export function colourOf(number) {
  if (number < 16) return SIXTEEN[number];
  if (number >= 232) return `rgb(${Array(3).fill(8 + (number - 232) * 10).join(" ")})`;
  const level = (value) => (value === 0 ? 0 : 55 + value * 40);
  const index = number - 16;
  return `rgb(${level(Math.floor(index / 36))} ${level(Math.floor(index / 6) % 6)} ${level(index % 6)})`;
}
