"use strict";
// The data are those of trace_page.py. Text is set as textContent only.
const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs, two = runs.length > 1;
const last = Math.max(...runs.map((run) => run.known.length - 1));
const unit = data.digits > 1 ? "digit" : "token";
const knownWord = data.changing ? "final" : "known";
const count = new Intl.NumberFormat("en");
const byId = (id) => document.getElementById(id);
let pass = 0, chosen = null, timer = null;

function make(tag, name = "", text = "") {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== "") element.textContent = text;
  return element;
}
const plural = (number, word) => `${count.format(number)} ${word}${number === 1 ? "" : "s"}`;
const share = (value) => (value > 0 && value < 0.001 ? "<0.1%" : `${(100 * value).toFixed(value > 0 && value < 0.0995 ? 1 : 0)}%`);
const digitsOf = (text) => (text === "" ? [] : data.base > 10 ? text.split(" ") : [...text]);

// The place of the last entry whose pass is at most `number`, -1 without one.
function placeOf(entries, number) {
  let low = 0, high = entries.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (entries[middle][0] <= number) low = middle + 1; else high = middle;
  }
  return low - 1;
}

// What is to be seen of a token after `number` passes. Its prediction is that of the next pass, which starts from this
// state, or the latest before it.
function lookAt(token, number) {
  const at = placeOf(token.changes, number), change = token.changes[at], before = token.changes[at - 1];
  const prediction = token.predictions[placeOf(token.predictions, number + 1)];
  const isNow = number > 0 && change[0] === number;
  const digits = digitsOf(change[2]), old = isNow && before ? digitsOf(before[2]) : digits;
  const wasHidden = (place) => isNow && before !== undefined && old[place] === ".";
  const hidden = change[1] < 0, lost = isNow && before[1] >= 0 || digits.some((each, place) => each === "." && old[place] !== ".");
  let kind = "known";
  if (token.given) kind = "given";
  else if (hidden) kind = lost ? "again" : digits.some((each) => each !== ".") ? "part" : "hidden";
  else if (data.changing && change[1] !== token.final) kind = "draft";
  else if (isNow) kind = "new";
  // A prediction from before the token's last change says nothing of its present digits.
  const stale = hidden && change[0] > 0 && prediction !== undefined && prediction[0] <= change[0];
  return {
    kind, isNow, stale, hidden, digits, prediction, fresh: digits.map((each, place) => each !== "." && wasHidden(place)),
    text: hidden ? null : data.texts[change[1]], number: change[1], left: change[3], since: change[0],
    key: `${at} ${isNow} ${stale} ${prediction ? prediction[0] : ""}`,
  };
}

function candidatesOf(prediction) {
  const found = [];
  for (let place = 2; prediction && place < prediction.length; place += 2) {
    found.push({ number: prediction[place], share: prediction[place + 1] / 1e4 });
  }
  return found;
}

// -- cells ---------------------------------------------------------------------------------------------------------

function fillDigits(parent, view) {
  while (parent.children.length < view.digits.length) parent.append(make("i"));
  view.digits.forEach((digit, place) => {
    const box = parent.children[place];
    box.textContent = digit === "." ? "·" : digit;
    box.className = (digit === "." ? "off" : digit === "1" && data.base === 2 ? "one" : "") + (view.fresh[place] ? " fresh" : "");
  });
}

function fillTop(list, view, others) {
  const rows = candidatesOf(view.prediction).map((each) => {
    const row = make("li", each.number === view.number ? "chosen" : ""), fill = make("i", "fill");
    fill.style.width = `${100 * each.share}%`;
    row.append(fill, make("b", "", data.texts[each.number]), make("span", "", share(each.share)));
    return row;
  });
  const rest = 1 - candidatesOf(view.prediction).reduce((sum, each) => sum + each.share, 0);
  if (others && rows.length && rest > 1e-4) {
    const row = make("li", "others");
    row.append(make("b", "", "all others"), make("span", "", share(rest)));
    rows.push(row);
  }
  list.replaceChildren(...rows);
}

function leftOf(view) {
  if (view.left < 0) return "";
  return view.hidden ? `${count.format(view.left)} left` : "";
}

function describe(view, index) {
  const parts = [`token ${index + 1}`];
  if (view.text !== null) parts.push(view.text);
  const visible = view.digits.filter((each) => each !== ".").length;
  if (view.hidden && view.digits.length) parts.push(`${visible} of ${view.digits.length} digits known`);
  if (view.hidden) parts.push(view.kind === "again" ? "hidden again" : "hidden");
  if (view.hidden && view.left > 0) parts.push(`${count.format(view.left)} candidates left`);
  const best = view.stale ? undefined : candidatesOf(view.prediction)[0];
  if (view.hidden && best) parts.push(`likeliest ${data.texts[best.number]} ${share(best.share)}`);
  if (view.kind === "given" || view.kind === "new") parts.push(view.kind);
  if (view.kind === "draft") parts.push("not final");
  return parts.join(", ");
}

const digitLines = data.digits > 8 ? 2 : 1;
const digitsWidth = data.digits > 1 ? Math.ceil(data.digits / digitLines) * (data.base > 10 ? 8 + 7 * String(data.base - 1).length : 14) : 0;

function makeBoard(run, number) {
  const board = make("section", "board"), heading = make("h2", "", ""), cells = make("div", "cells");
  board.setAttribute("aria-label", `Tokens, ${run.name}`);
  if (two) heading.append(make("span", "", `${"AB"[number]} · ${run.name}`));
  else heading.append(make("span", "", run.name));
  run.count = make("small");
  heading.append(run.count);
  cells.setAttribute("role", "listbox");
  cells.setAttribute("aria-label", `Tokens of ${run.name}`);
  cells.setAttribute("aria-orientation", "horizontal");
  run.cells = run.tokens.map((token, index) => {
    const root = make("div", "cell");
    root.setAttribute("role", "option");
    root.setAttribute("aria-selected", "false");
    root.tabIndex = index ? -1 : 0;
    const cell = { root, token, index, run, key: null, text: make("span", "text"), left: make("span", "left"), top: make("ol", "top") };
    cell.digits = make("span", "digits");
    const width = Math.max(digitsWidth, 8.6 * [...data.texts[token.final]].length, token.given ? 0 : brief ? 70 : 104);
    root.style.width = `${Math.ceil(width + 16)}px`;
    if (digitsWidth) cell.digits.style.width = `${digitsWidth}px`;
    root.append(cell.text);
    if (digitsWidth) root.append(cell.digits);
    if (!data.changing && !token.given) root.append(cell.left);
    if (!brief && !token.given) root.append(cell.top);
    root.cell = cell;
    cells.append(root);
    return cell;
  });
  board.append(heading, cells);
  return board;
}

function paint(cell) {
  const view = lookAt(cell.token, Math.min(pass, cell.run.known.length - 1));
  const key = `${view.key} ${pass > cell.run.known.length - 1}`;
  if (key === cell.key) return;
  cell.key = key;
  const best = view.stale ? undefined : candidatesOf(view.prediction)[0];
  cell.text.textContent = view.text !== null ? view.text : best ? data.texts[best.number] : "";
  cell.root.className = `cell ${view.kind}${cell.token.word ? " word" : ""}${view.isNow && view.kind !== "new" ? " changed" : ""}`;
  cell.left.textContent = leftOf(view);
  if (digitsWidth) fillDigits(cell.digits, view);
  if (!brief && !cell.token.given) fillTop(cell.top, view.stale ? {} : view, false);
  cell.root.setAttribute("aria-label", describe(view, cell.index));
}

// -- the chosen token ----------------------------------------------------------------------------------------------

function inspect() {
  const panel = byId("inspector");
  panel.hidden = chosen === null;
  if (chosen === null) return;
  const parts = [];
  runs.forEach((run, number) => {
    const token = run.tokens[chosen];
    if (!token) return;
    const at = Math.min(pass, run.known.length - 1), view = lookAt(token, at), part = make("div", "run");
    const heading = make("h2", "", two ? `${"AB"[number]} · token ${chosen + 1}` : `Token ${chosen + 1}`);
    heading.append(make("q", "", view.text ?? "?"));
    part.append(heading);
    if (view.digits.length) {
      const digits = make("div", "digits");
      fillDigits(digits, view);
      part.append(digits);
    }
    let state = token.given ? "given" : view.hidden ? (view.kind === "again" ? `hidden again in pass ${view.since}` : "hidden") : view.kind === "draft" ? "not final" : `${data.changing ? "so since" : "known since"} pass ${view.since}`;
    if (view.hidden && view.left > 0) state += `, ${plural(view.left, "candidate")} left`;
    part.append(make("p", "", state));
    if (view.prediction) {
      const made = view.prediction[0];
      part.append(make("p", "", `${made === at + 1 ? "The network, of this state" : `The network, in pass ${made}${view.stale ? ", before the last digits" : ""}`}: entropy ${view.prediction[1].toFixed(2)} nats`));
      const list = make("ol", "top");
      fillTop(list, view, true);
      part.append(list);
    } else if (!token.given) part.append(make("p", "", "not scored yet"));
    parts.push(part);
  });
  panel.replaceChildren(...parts);
}

function choose(cell, focus) {
  for (const run of runs) {
    for (const each of [run.cells[chosen], run.cells[cell.index]]) if (each) {
      const on = each.index === cell.index;
      each.root.setAttribute("aria-selected", String(on));
      each.root.tabIndex = on ? 0 : -1;
    }
    if (run.cells[0] && !run.cells[cell.index]) run.cells[0].root.tabIndex = 0;
    else if (cell.index && run.cells[0]) run.cells[0].root.tabIndex = -1;
  }
  chosen = cell.index;
  if (focus) cell.root.focus();
  inspect();
}

// -- charts --------------------------------------------------------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";
const CHARTS = [
  { title: data.digits > 1 ? "Digits known" : `Tokens ${knownWord}`, of: (run) => run.known, most: 1, show: share, kind: "line" },
  { title: data.changing ? "Tokens changed in the pass" : `${data.digits > 1 ? "Digits" : "Tokens"} revealed in the pass`, of: (run) => run.revealed, show: count.format, kind: "bars" },
  { title: "Entropy of the scored tokens, nats", of: (run) => run.entropy, show: (value) => value.toFixed(2), kind: "line" },
];

function path(name, d) {
  const element = document.createElementNS(SVG, "path");
  element.setAttribute("class", name);
  element.setAttribute("d", d);
  return element;
}

function makeChart(chart) {
  const root = make("div", "chart"), heading = make("h2", "", chart.title), plot = make("div", "plot"), svg = document.createElementNS(SVG, "svg");
  chart.values = runs.map(chart.of);
  chart.most ??= Math.max(1e-9, ...chart.values.flat().map((value) => value ?? 0));
  chart.caption = make("span");
  heading.append(chart.caption);
  svg.setAttribute("viewBox", "0 0 100 100");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const width = 100 / Math.max(1, last), mirrored = chart.kind === "bars" && two;
  // A bar fills the step that leads to its pass.
  chart.x = (number) => 100 * Math.max(0, chart.kind === "bars" ? number - 0.5 : number) / Math.max(1, last);
  chart.y = (value, number) => mirrored ? 50 + (number ? 50 : -50) * value / chart.most : 100 - 100 * value / chart.most;
  svg.append(path("axis", mirrored ? "M0 50H100" : "M0 100H100"));
  chart.values.forEach((values, number) => {
    const side = number ? " b" : "", zero = mirrored ? 50 : 100;
    if (chart.kind === "bars") {
      const bar = (value, at) => !at || !value ? "" : `M${(chart.x(at) - 0.4 * width).toFixed(3)} ${zero}V${chart.y(value, number).toFixed(2)}h${(0.8 * width).toFixed(3)}V${zero}z`;
      svg.append(path(`bars${side}`, values.map(bar).join("")));
    } else {
      let d = "", pen = "M";
      values.forEach((value, at) => {
        if (value === null) return;
        d += `${pen}${chart.x(at).toFixed(3)} ${chart.y(value, number).toFixed(2)}`;
        pen = "L";
      });
      svg.append(path(`line${side}`, d || "M0 0"));
    }
  });
  chart.cursor = make("div", "cursor");
  chart.marks = runs.map((run, number) => make("div", number ? "mark b" : "mark"));
  plot.append(svg, chart.cursor, ...(chart.kind === "line" ? chart.marks : []), make("span", "scale", chart.show(chart.most)));
  const seek = (event) => {
    const box = plot.getBoundingClientRect();
    go(Math.round(last * (event.clientX - box.left) / box.width + (chart.kind === "bars" ? 0.5 : 0)));
  };
  plot.addEventListener("pointerdown", (event) => { stop(); seek(event); plot.setPointerCapture(event.pointerId); });
  plot.addEventListener("pointermove", (event) => { if (event.buttons & 1) seek(event); });
  const ends = make("div", "ends");
  ends.append(make("span", "", "pass 0"), make("span", "", `pass ${last}`));
  root.append(heading, plot, ends);
  return root;
}

function mark(chart) {
  const captions = [];
  chart.cursor.style.left = `${chart.x(pass)}%`;
  chart.values.forEach((values, number) => {
    const at = Math.min(pass, values.length - 1), value = pass < values.length || chart.of(runs[number]) === runs[number].known ? values[at] : null;
    chart.marks[number].hidden = value === null || value === undefined;
    captions.push((two ? `${"AB"[number]} ` : "") + (value === null || value === undefined ? "–" : chart.show(value)));
    if (value !== null && value !== undefined) {
      chart.marks[number].style.left = `${chart.x(at)}%`;
      chart.marks[number].style.top = `${chart.y(value, number)}%`;
    }
  });
  chart.caption.textContent = captions.join("   ");
}

// -- passes --------------------------------------------------------------------------------------------------------

function statusOf(run, number) {
  const at = Math.min(pass, run.known.length - 1), parts = [`${share(run.known[at])} ${knownWord}`];
  if (pass > at) parts.push(`done in ${plural(at, "pass").replace("passs", "passes")}`);
  else if (at > 0) parts.push(`${plural(run.revealed[at], unit)} ${data.changing ? "changed" : "revealed"}`);
  if (pass <= at && run.hidden[at]) parts.push(`${count.format(run.hidden[at])} hidden again`);
  return (two ? `${"AB"[number]}: ` : "") + parts.join(", ");
}

function render() {
  for (const run of runs) {
    for (const cell of run.cells) paint(cell);
    const at = Math.min(pass, run.known.length - 1);
    run.count.textContent = `pass ${at} of ${run.known.length - 1} · ${share(run.known[at])} ${knownWord}`;
  }
  CHARTS.forEach(mark);
  inspect();
  const scrubber = byId("scrubber"), status = `Pass ${pass} of ${last} · ${runs.map(statusOf).join(" · ")}`;
  scrubber.value = pass;
  scrubber.setAttribute("aria-valuetext", `pass ${pass} of ${last}`);
  byId("status").textContent = status;
}

function go(number) {
  const next = Math.min(last, Math.max(0, number));
  if (next === pass) return;
  pass = next;
  render();
}

function stop() {
  if (timer !== null) clearTimeout(timer);
  timer = null;
  byId("play").textContent = "Play";
  byId("status").setAttribute("aria-live", "polite");
}

function play() {
  if (pass >= last) go(0);
  byId("play").textContent = "Pause";
  byId("status").setAttribute("aria-live", "off");  // not a message a pass
  const step = () => {
    go(pass + 1);
    if (pass >= last) stop(); else timer = setTimeout(step, wait());
  };
  timer = setTimeout(step, wait());
}

const wait = () => Math.min(800, Math.max(60, 15000 / last)) / Number(byId("speed").value);
const toggle = () => (timer === null ? play() : stop());

function moveChoice(cell, key) {
  const cells = cell.run.cells, box = cell.root.getBoundingClientRect();
  if (key === "ArrowLeft" || key === "ArrowRight") return cells[cell.index + (key === "ArrowLeft" ? -1 : 1)];
  const up = key === "ArrowUp", below = (each) => (up ? each.bottom <= box.top + 1 : each.top >= box.bottom - 1);
  let best = null, least = Infinity;
  for (const each of cells) {
    const other = each.root.getBoundingClientRect();
    const distance = 4 * Math.abs(other.top - box.top) + Math.abs(other.left + other.width / 2 - box.left - box.width / 2);
    if (below(other) && distance < least) [best, least] = [each, distance];
  }
  return best;
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const { key, target } = event, cell = target.closest?.(".cells .cell")?.cell, inSelect = target.tagName === "SELECT";
  const ownSpace = ["BUTTON", "SELECT", "SUMMARY"].includes(target.tagName);
  if (key === " " && !ownSpace) toggle();
  else if (cell && key.startsWith("Arrow")) {
    const next = moveChoice(cell, key);
    if (next) choose(next, true);
  } else if (inSelect) return;
  else if (key === "ArrowRight" || key === ".") { stop(); go(pass + 1); }
  else if (key === "ArrowLeft" || key === ",") { stop(); go(pass - 1); }
  else if (key === "Home") { stop(); go(0); }
  else if (key === "End") { stop(); go(last); }
  else return;
  event.preventDefault();
});

byId("play").addEventListener("click", toggle);
byId("back").addEventListener("click", () => { stop(); go(pass - 1); });
byId("forward").addEventListener("click", () => { stop(); go(pass + 1); });
byId("scrubber").addEventListener("input", (event) => { stop(); go(Number(event.target.value)); });
byId("boards").addEventListener("click", (event) => { const root = event.target.closest(".cell"); if (root) choose(root.cell, true); });
byId("boards").addEventListener("focusin", (event) => { const root = event.target.closest(".cell"); if (root && root.cell.index !== chosen) choose(root.cell, false); });

// -- the page ------------------------------------------------------------------------------------------------------

const most = Math.max(...runs.map((run) => run.tokens.length));
const brief = most * runs.length > 40;  // too many tokens for their candidates to stand in every cell

function legend() {
  const list = make("ul"), entries = [["given", "text", "given"], ["new", "text", `${data.changing ? "changed to its final token" : "known"} in this pass`], ["known", "text", knownWord]];
  if (data.changing) entries.splice(1, 0, ["draft", "text", "not final yet; a dot where it has just changed"]);
  else entries.splice(1, 0, ["hidden", "text", "hidden; the text is the likeliest token"]);
  if (runs.some((run) => run.hidden.some(Boolean))) entries.push(["again", "text", "hidden again in this pass"]);
  for (const [kind, text, meaning] of entries) {
    const item = make("li"), sample = make("span", `cell ${kind}`);
    sample.append(make("span", "text", text));
    item.append(sample, make("span", "", meaning));
    list.append(item);
  }
  if (data.digits > 1) {
    const item = make("li"), digits = make("span", "digits");
    fillDigits(digits, { digits: ["0", "1", ".", "0"], fresh: [false, false, false, true] });
    item.append(digits, make("span", "", "digits of a token: known, known, hidden, new in this pass"));
    list.append(item);
  }
  if (!data.changing) {
    const item = make("li");
    item.append(make("span", "cell left", "12 left"), make("span", "", data.digits > 1 ? "tokens that the visible digits allow" : "tokens that it can be"));
    list.append(item);
  }
  return [make("h2", "", "How to read the cells"), list];
}

byId("title").textContent = two ? "One seed, two samplers" : `${plural(runs[0].tokens.filter((each) => !each.given).length, "token")} in ${last} ${last === 1 ? "pass" : "passes"}`;
document.title = byId("title").textContent;
for (const [name, value] of data.facts) {
  const fact = make("div");
  fact.append(make("dt", "", name), make("dd", "", value));
  byId("facts").append(fact);
}
byId("main").classList.toggle("two", two);
byId("main").classList.toggle("long", most > 80);
byId("main").classList.toggle("brief", brief);
byId("scrubber").max = last;
byId("boards").append(...runs.map(makeBoard));
byId("charts").append(...CHARTS.map(makeChart));
byId("legend").append(...legend());
byId("texts").append(...runs.flatMap((run, number) => [...(two ? [make("h2", "", `${"AB"[number]} · ${run.name}`)] : []), make("pre", "", run.text)]));
pass = Math.min(last, Math.max(0, Number.parseInt(location.hash.slice(1), 10) || 0));  // out.html#5 opens at pass 5
const first = runs[0].cells.find((cell) => !cell.token.given) ?? runs[0].cells[0];
choose(first, false);
render();
// Milliseconds from the start of the navigation until the page has been painted.
requestAnimationFrame(() => setTimeout(() => { document.documentElement.dataset.ready = String(Math.round(performance.now())); }));
