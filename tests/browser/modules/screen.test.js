import assert from "node:assert/strict";
import { test } from "node:test";
import { Screen, colourOf } from "../../../skep/dashboard/static/screen.js";

/** A screen of 4 by 10 after some output. */
function after(...pieces) {
  const screen = new Screen(4, 10);
  for (const piece of pieces) screen.write(piece);
  return screen;
}

for (const [what, pieces, expected] of [
  ["lines", ["one\r\ntwo"], "one\ntwo"],
  ["a long line wraps", ["0123456789ab"], "0123456789\nab"],
  ["a full line does not wrap before its next character", ["0123456789\r\nx"], "0123456789\nx"],
  ["scrolling", ["1\r\n2\r\n3\r\n4\r\n5"], "2\n3\n4\n5"],
  ["backspace and over-writing", ["abc\b\bX"], "aXc"],
  ["tabs", ["a\tb"], "a       b"],
  ["cursor addressing", ["\u001b[2;3Hx\u001b[Hy"], "y\n  x"],
  ["erasing to the end of the line", ["abcdef\u001b[1;3H\u001b[K"], "ab"],
  ["clearing", ["abc\r\ndef\u001b[2J\u001b[Hx"], "x"],
  ["deleted and inserted characters", ["abcdef\u001b[1;2H\u001b[2P\u001b[1@"], "a def"],
  ["deleted and inserted lines", ["1\r\n2\r\n3\u001b[1;1H\u001b[M\u001b[2;1H\u001b[Lx"], "2\nx\n3"],
  ["a scrolling region", ["1\r\n2\r\n3\r\n4\u001b[2;3r\u001b[3;1H\nx"], "1\n3\nx\n4"],
  ["the other screen of an editor goes without a trace", ["shell\u001b[?1049h\u001b[2Jeditor\u001b[?1049l"], "shell"],
  ["a sequence that is cut anywhere", ["a\u001b", "[", "3", "1mb\u001b]0;ti", "tle\u0007c"], "abc"],
  ["titles, character sets and unknown sequences", ["\u001b]2;evil\u001b\\\u001b(Bx\u001b[>4;2m\u001b[?2004hy\u001b=z"], "xyz"],
  ["a reversed feed at the top", ["1\u001b[H\u001bM0"], "0\n1"],
  ["characters beyond the first plane", ["🐝x"], "🐝x"],
]) {
  test(what, () => assert.equal(after(...pieces).text(), expected));
}

test("looks are runs", () => {
  const runs = after("a\u001b[1;31mb\u001b[38;5;200mc\u001b[48;2;255;0;0md\u001b[0me").runs(0);
  assert.deepEqual(runs.map(({ text }) => text.trim()), ["a", "b", "c", "d", "e"]);
  assert.equal(runs[1].look.bold, true);
  assert.deepEqual([runs[1].look.fg, runs[2].look.fg, runs[3].look.bg], [1, 200, 196]);
  assert.equal(colourOf(196), "rgb(255 0 0)");
});
test("a program that asks where the cursor is gets an answer", () => {
  const said = [];
  const screen = new Screen(4, 10, (text) => said.push(text));
  screen.write("\u001b[3;4H\u001b[6n");
  assert.deepEqual(said, ["\u001b[3;4R"]);
});
test("a changed size keeps the end of what was there", () => {
  const screen = after("1\r\n2\r\n3\r\n4");
  screen.resize(2, 5);
  assert.equal(screen.text(), "3\n4");
  screen.resize(5, 20);
  assert.equal(screen.text(), "3\n4");
});
test("anything at all leaves a screen of its size", () => {
  let seed = 7;
  const random = (below) => {
    seed = (seed * 1103515245 + 12345) & 0x7fffffff;
    return seed % below;
  };
  const pieces = ["\u001b[", "\u001b", "?", ";", "m", "H", "J", "L", "M", "P", "@", "r", "S", "T", "X", "999999999", "-1", "h", "l", "\n", "\r", "x", "1049", "\u001b]", "\u0007", "🐝", "\u001b7", "\u001b8", "\u001bM"];
  const screen = new Screen(5, 9);
  for (let i = 0; i < 20_000; i += 1) {
    screen.write(pieces[random(pieces.length)]);
    if (i % 997 === 0) screen.resize(2 + random(9), 2 + random(30));
    assert.ok(screen.cursor.row < screen.rows && screen.cursor.column < screen.columns);
  }
  for (let row = 0; row < screen.rows; row += 1) {
    assert.equal(screen.runs(row).reduce((sum, { text }) => sum + [...text].length, 0), screen.columns);
  }
});
