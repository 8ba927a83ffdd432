"use strict";
const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);

// -- theme -----------------------------------------------------------------------------------------------
const root = document.documentElement;
function setTheme(theme) {
  root.dataset.theme = theme;
  byId("theme").textContent = theme === "dark" ? "light" : "dark";
}
const preferred = window.matchMedia("(prefers-color-scheme: dark)");
preferred.addEventListener("change", () => setTheme(preferred.matches ? "dark" : "light"));
byId("theme").addEventListener("click", () => setTheme(root.dataset.theme === "dark" ? "light" : "dark"));
setTheme(preferred.matches ? "dark" : "light");

// -- table of runs ---------------------------------------------------------------------------------------
const table = byId("table");
const headings = [...table.querySelectorAll("th")];
headings.forEach((heading, column) => {
  heading.firstElementChild.addEventListener("click", () => {
    const descending = heading.getAttribute("aria-sort") === "ascending";
    headings.forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const number = heading.dataset.kind === "number";
    const value = (row) => {
      const cell = row.cells[column];
      if (!number) return cell.textContent;
      return cell.dataset.value === "" ? NaN : Number(cell.dataset.value);
    };
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (number) {
        // What was not measured stays at the end whichever way the rest is sorted.
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
        return descending ? y - x : x - y;
      }
      return descending ? y.localeCompare(x) : x.localeCompare(y);
    });
    table.tBodies[0].append(...rows);
  });
});
byId("csv").addEventListener("click", () => {
  const names = [...new Set(data.table.flatMap((row) => Object.keys(row)))];
  // A leading = + - @ would be a formula to a spreadsheet.
  const text = (value) => (/^[=+@\t-]/.test(value) && Number.isNaN(Number(value)) ? "'" + value : value);
  const cell = (value) => (value == null ? "" : '"' + text(String(value)).replaceAll('"', '""') + '"');
  const lines = [names.map(cell), ...data.table.map((row) => names.map((name) => cell(row[name])))];
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines.map((line) => line.join(",")).join("\n") + "\n"], { type: "text/csv" }));
  link.download = "runs.csv";
  link.click();
  URL.revokeObjectURL(link.href);
});

// -- rows ------------------------------------------------------------------------------------------------
const STEP = 20;
let shown = STEP;
function options(select, values) {
  select.replaceChildren(...values.map((value) => new Option(value, value)));
}
function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  // Generated text is never parsed as HTML.
  if (text !== undefined) made.textContent = text;
  return made;
}
const probability = (value) => (value == null ? "–" : value > 0 && value < 1e-3 ? value.toExponential(1) : value.toFixed(3));
const WORD = /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}]\p{M}*|[\p{L}\p{M}\p{N}]+/gu;
function words(text) {
  return [...text.matchAll(WORD)].map((found) => ({ word: found[0].toLowerCase(), from: found.index, to: found.index + found[0].length }));
}
// The words of `text` that are in a longest common subsequence with those of `answer`.
function repeated(text, answer) {
  const [a, b] = [words(text), words(answer)];
  const length = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      length[i][j] = a[i].word === b[j].word ? length[i + 1][j + 1] + 1 : Math.max(length[i + 1][j], length[i][j + 1]);
    }
  }
  const found = [];
  for (let i = 0, j = 0; i < a.length && j < b.length; ) {
    if (a[i].word === b[j].word) { found.push(a[i]); i++; j++; }
    else if (length[i + 1][j] >= length[i][j + 1]) i++;
    else j++;
  }
  return found;
}
function marked(text, answer) {
  const made = element("dd");
  let end = 0;
  for (const word of repeated(text, answer)) {
    made.append(text.slice(end, word.from), element("mark", "", text.slice(word.from, word.to)));
    end = word.to;
  }
  made.append(text.slice(end) || (text ? "" : "(nothing)"));
  return made;
}
function card(row) {
  const made = element("article", "card");
  const ratio = row.ratio == null ? "" : `, truth ratio ${row.ratio.toPrecision(3)}`;
  made.append(
    element("div", "head", `${row.split} ${row.index} · probability ${probability(row.before)} → ${probability(row.now)}${ratio}`),
    element("div", "question", row.question ?? ""),
  );
  const list = element("dl");
  if (row.answer != null) list.append(element("dt", "", "true answer"), element("dd", "", row.answer));
  for (const [label, text] of [["start model", row.said], ["retrained model", row.unseen], ["this model", row.says]]) {
    if (text != null) list.append(element("dt", "", label), marked(text, row.answer ?? ""));
  }
  made.append(list);
  return made;
}
function browse() {
  const rows = data.rows[byId("run").value] ?? [];
  const words = byId("search").value.toLowerCase();
  const found = rows.filter((row) => row.split === byId("split").value &&
    (!words || [row.question, row.answer, row.said, row.unseen, row.says].some((text) => text?.toLowerCase().includes(words))));
  const order = byId("order").value;
  const change = (row) => Math.abs((row.now ?? 0) - (row.before ?? 0));
  if (order === "change") found.sort((a, b) => change(b) - change(a));
  if (order === "now") found.sort((a, b) => (b.now ?? 0) - (a.now ?? 0));
  byId("count").textContent = `${found.length} rows`;
  byId("cards").replaceChildren(...found.slice(0, shown).map(card));
  byId("more").hidden = found.length <= shown;
}
function splits() {
  options(byId("split"), [...new Set((data.rows[byId("run").value] ?? []).map((row) => row.split))]);
}
const names = Object.keys(data.rows);
if (names.length === 0) {
  byId("browser").hidden = true;
} else {
  options(byId("run"), names);
  splits();
  const again = () => { shown = STEP; browse(); };
  byId("run").addEventListener("change", splits);
  for (const id of ["run", "split", "order"]) byId(id).addEventListener("change", again);
  byId("search").addEventListener("input", again);
  byId("more").addEventListener("click", () => { shown += STEP; browse(); });
  browse();
}
