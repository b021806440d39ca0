"use strict";
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const whenSeen = (selector, show) => {
  const seen = new IntersectionObserver(entries => entries.filter(each => each.isIntersecting).forEach(each => {
    seen.unobserve(each.target);
    show(each.target);
  }), { rootMargin: "300px" });
  all(selector).forEach(place => seen.observe(place));
};

// Pictures are decoded when they come into view, so that a page of thousands opens at once.
const load = image => { if (!image.src) image.src = image.dataset.src; };
whenSeen("img[data-src]", load);
addEventListener("beforeprint", () => all("img[data-src]").forEach(load));

const value = (row, at) => row.cells[at].dataset.v ?? row.cells[at].textContent;
const number = (row, at) => row.cells[at].dataset.v === undefined ? -Infinity : parseFloat(row.cells[at].dataset.v);
function sort(head) {
  const at = head.cellIndex, up = head.ariaSort !== "ascending", table = head.closest("table");
  all("th[aria-sort]", table).forEach(each => each.removeAttribute("aria-sort"));
  head.ariaSort = up ? "ascending" : "descending";
  const rows = [...table.tBodies[0].rows];
  const numeric = rows.some(row => row.cells[at].dataset.v !== undefined);
  const byText = (a, b) => value(a, at).localeCompare(value(b, at), undefined, { numeric: true });
  const byNumber = (a, b) => number(a, at) === number(b, at) ? 0 : number(a, at) < number(b, at) ? -1 : 1;
  rows.sort(numeric ? byNumber : byText);
  table.tBodies[0].append(...(up ? rows : rows.reverse()));
  arrange(table);
}
all("thead button").forEach(button => button.addEventListener("click", () => sort(button.closest("th"))));

// Long tables show their first rows, and more as their end comes into view: thousands at once take seconds to lay out.
let matching = null;  // names of the subjects that the filter leaves; null: all
const limits = new Map(all("table:has(tbody tr[hidden])").map(table => [table, all("tbody tr:not([hidden])", table).length]));
function arrange(table) {
  let left = limits.get(table) ?? Infinity;
  for (const row of table.tBodies[0].rows) {
    row.hidden = Boolean(matching && row.dataset.name && !matching.has(row.dataset.name)) || left-- <= 0;
  }
  if (limits.has(table)) more.get(table).hidden = left > 0;
}
const more = new Map([...limits.keys()].map(table => {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: "Show more rows" });
  const show = () => { limits.set(table, 2 * limits.get(table)); arrange(table); };
  button.addEventListener("click", show);
  new IntersectionObserver(([entry]) => { if (entry.isIntersecting) show(); }).observe(button);
  table.closest(".scroll").after(button);
  return [table, button];
}));
addEventListener("beforeprint", () => limits.forEach((_, table) => { limits.set(table, Infinity); arrange(table); }));

// Subjects are filtered by a word and by their verdict, in every table that has a row for each.
function filter() {
  const word = document.getElementById("word").value.trim().toLowerCase();
  const verdict = document.querySelector(".chips [aria-pressed=true]")?.dataset.verdict;
  const rows = all("#subjects tbody tr");
  const shown = rows.filter(row => (!verdict || row.dataset.verdict === verdict) && row.textContent.toLowerCase().includes(word));
  matching = shown.length === rows.length ? null : new Set(shown.map(row => row.dataset.name));
  all("table:has([data-name])").forEach(arrange);
  document.getElementById("shown").textContent =
    matching ? `${shown.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} shown` : "";
}
document.getElementById("word")?.addEventListener("input", filter);
all(".chips button").forEach(chip => chip.addEventListener("click", () => {
  const pressed = chip.ariaPressed !== "true";
  all(".chips button").forEach(each => { each.ariaPressed = pressed && each === chip; });
  filter();
}));

all("[data-copy]").forEach(button => button.addEventListener("click", async () => {
  const code = button.previousElementSibling;
  try {
    await navigator.clipboard.writeText(code.textContent);
    button.textContent = "Copied";
  } catch {  // a page of a file, or of plain HTTP
    getSelection().selectAllChildren(code);
    button.textContent = document.execCommand("copy") ? "Copied" : "Press Ctrl+C";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 2000);
}));

const viewer = document.getElementById("viewer");
all(".pair").forEach(pair => pair.addEventListener("click", () => {
  document.getElementById("viewer-title").textContent = pair.ariaLabel;
  const figures = all("img", pair).map(image => {
    load(image);
    const figure = document.createElement("figure"), caption = document.createElement("figcaption"), large = image.cloneNode();
    caption.textContent = image.classList.contains("base") ? "base model" : "fine-tuned";
    large.classList.remove("base");
    figure.append(large, caption);
    return figure;
  });
  viewer.querySelector(".side-by-side").replaceChildren(...figures);
  viewer.showModal();
}));
viewer.addEventListener("click", event => { if (event.target === viewer) viewer.close(); });

const wide = new ResizeObserver(entries => entries.forEach(({ target }) =>
  target.classList.toggle("wide", target.scrollWidth > target.clientWidth + 8)));
all(".scroll").forEach(place => wide.observe(place));

const colour = name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
function draw(place) {
  const { x, xLabel, yLabel, series, points, many } = JSON.parse(place.dataset.chart);
  const axis = label => ({ label, stroke: () => colour("soft"), grid: { stroke: () => colour("line") },
    ticks: { stroke: () => colour("line") }, labelSize: 22, size: label === xLabel ? 32 : 56 });
  const hue = at => `hsl(${Math.round(at * 137.5) % 360} 65% 50%)`;
  const lines = series.map(({ label, kind, faint }, at) => ({ label, class: faint ? "faint" : "line", spanGaps: true,
    stroke: () => many ? hue(at) : colour(kind) + (faint ? "55" : ""), width: faint ? 1 : 2,
    points: { show: points, size: 7 } }));
  const named = place.nextElementSibling, title = named.textContent;
  const chart = new uPlot({
    width: place.clientWidth, height: 220,
    scales: { x: { time: false }, y: { range: (_, low, high) => [Math.min(0, low), high * 1.05 || 1] } },
    axes: [axis(xLabel), axis(yLabel)],
    legend: { show: !many },
    cursor: many ? { focus: { prox: 1e6 } } : {},
    focus: { alpha: 0.15 },
    series: [{ label: xLabel }, ...lines],
    hooks: many ? { setCursor: [self => {
      const at = self.cursor.idx, nearest = self.series.findIndex((one, place) => place > 0 && one._focus);
      const found = at !== null && nearest > 0 ? self.data[nearest][at] : null;
      named.textContent = found === null ? title : `${self.series[nearest].label}: ${found} at ${xLabel} ${self.data[0][at]}`;
    }] } : {},
  }, [x, ...series.map(one => one.values)], place);
  new ResizeObserver(() => chart.setSize({ width: place.clientWidth, height: 220 })).observe(place);
}
whenSeen("[data-chart]", draw);
