"use strict";
const byId = (id) => document.getElementById(id);
const parse = (id) => JSON.parse(byId(id).textContent);
const data = parse("data");
const plots = parse("plots");

// -- theme -----------------------------------------------------------------------------------------------
const root = document.documentElement;
function paint() {
  const style = getComputedStyle(root);
  const color = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: color("--line"), zerolinecolor: color("--line"), linecolor: color("--line") };
  const narrow = window.innerWidth < 640;
  for (const plot of plots) {
    const layout = {
      ...plot.figure.layout,
      template: {},
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: color("--text"), family: "system-ui, sans-serif" },
      margin: { l: 60, r: 15, t: 35, b: 50 },
      legend: narrow ? { orientation: "h", y: -0.4 } : { x: 1.02, y: 1 },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: color("--faint"), activecolor: color("--text") },
      hoverlabel: { bgcolor: color("--raised"), font: { color: color("--text") } },
    };
    for (const key of Object.keys(plot.figure.layout)) {
      if (/^[xy]axis/.test(key)) layout[key] = { ...axis, ...plot.figure.layout[key], automargin: true };
    }
    Plotly.react(plot.id, plot.figure.data, layout, { responsive: true, displaylogo: false });
  }
}
function setTheme(theme) {
  root.dataset.theme = theme;
  byId("theme").textContent = theme === "dark" ? "light" : "dark";
  paint();
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
const percent = (value) => (value == null ? "–" : value.toFixed(3));
function card(row) {
  const made = element("article", "card");
  const ratio = row.ratio == null ? "" : `, truth ratio ${row.ratio.toPrecision(3)}`;
  made.append(
    element("div", "head", `${row.split} ${row.index} · probability ${percent(row.before)} → ${percent(row.now)}${ratio}`),
    element("div", "question", row.question ?? ""),
  );
  const list = element("dl");
  for (const [label, text] of [["answer", row.answer], ["start model", row.said], ["this model", row.says]]) {
    if (text != null) list.append(element("dt", "", label), element("dd", "", text === "" ? "(nothing)" : text));
  }
  made.append(list);
  return made;
}
function browse() {
  const rows = data.rows[byId("run").value] ?? [];
  const words = byId("search").value.toLowerCase();
  const found = rows.filter((row) => row.split === byId("split").value &&
    (!words || [row.question, row.answer, row.said, row.says].some((text) => text?.toLowerCase().includes(words))));
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
