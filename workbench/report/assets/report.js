"use strict";

const CONFIG = {
  responsive: true,
  displaylogo: false,
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "sendDataToCloud"],
};
const PRINT_WIDTH = 690;
const PRINT_ROWS = 40;

function drawFigures() {
  for (const source of document.querySelectorAll("script[data-figure]")) {
    const figure = JSON.parse(source.textContent);
    Plotly.newPlot(source.dataset.figure, figure.data, figure.layout, CONFIG);
  }
  const each = (change) => document.querySelectorAll(".plot").forEach((plot) => Plotly.relayout(plot, change));
  window.addEventListener("beforeprint", () => each({ autosize: false, width: PRINT_WIDTH }));
  window.addEventListener("afterprint", () => each({ autosize: true, width: null }));
}

// "l3" is layer 3 and not layer 30 too: after a digit only a whole name, or one up to its dot, will do.
function matches(name, word) {
  return /\d$/.test(word) ? name === word || name.startsWith(word + ".") : name.startsWith(word);
}

function liveHeads() {
  const table = document.getElementById("heads-table");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const buttons = Array.from(table.querySelectorAll("thead button[data-column]"));
  const search = document.getElementById("heads-search");
  const minima = Array.from(table.querySelectorAll("thead input[data-column]"));
  const count = document.getElementById("heads-count");
  const values = new Map(rows.map((row) => [row, Array.from(row.cells, (cell) => Number(cell.dataset.v ?? NaN))]));
  const place = new Map(rows.map((row, index) => [row, index]));
  let order = rows.slice();

  function refresh() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const limits = minima
      .filter((input) => input.value.trim() !== "" && input.validity.valid)
      .map((input) => [Number(input.dataset.column), Number(input.value)]);
    let shown = 0;
    for (const row of order) {
      const names = row.dataset.names.split(" ");
      const fits =
        words.every((word) => names.some((name) => matches(name, word))) &&
        limits.every(([column, limit]) => values.get(row)[column] >= limit);
      row.hidden = !fits;
      shown += fits ? 1 : 0;
      row.classList.toggle("beyond", shown > PRINT_ROWS);
    }
    count.textContent = `${shown} of ${rows.length} heads`;
  }

  function sort(column, direction) {
    const sign = direction === "ascending" ? 1 : -1;
    order.sort((a, b) => {
      const [x, y] = [values.get(a)[column], values.get(b)[column]];
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y) || place.get(a) - place.get(b);
      return sign * (x - y) || place.get(a) - place.get(b);
    });
    body.append(...order);
    for (const button of buttons) {
      const own = Number(button.dataset.column) === column;
      button.closest("th").setAttribute("aria-sort", own ? direction : "none");
    }
    refresh();
  }

  for (const button of buttons) {
    button.addEventListener("click", () => {
      const column = Number(button.dataset.column);
      const now = button.closest("th").getAttribute("aria-sort");
      const first = column === 0 ? "ascending" : "descending";
      const second = column === 0 ? "descending" : "ascending";
      sort(column, now === first ? second : first);
    });
  }
  search.addEventListener("input", refresh);
  minima.forEach((input) => input.addEventListener("input", refresh));
  document.getElementById("heads-clear").addEventListener("click", () => {
    search.value = "";
    minima.forEach((input) => (input.value = ""));
    refresh();
    search.focus();
  });
  refresh();
}

liveHeads();
drawFigures();
