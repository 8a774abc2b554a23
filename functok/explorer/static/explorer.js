// What the explorer does with a script; every page works without one.
"use strict";

const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const one = (selector, within = document) => within.querySelector(selector);
const INK = "#1b1f24";

// Charts: Vega, with its interpreter, as no page may make code out of text.
const charts = [];

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

async function drawCharts() {
  if (!window.vegaEmbed) return;
  while (charts.length) charts.pop().finalize();
  const ink = getComputedStyle(document.body).color;
  for (const place of all(".chart")) {
    const text = place.nextElementSibling.textContent;
    const spec = JSON.parse(text, (_, value) => (value === INK ? ink : value));
    const options = {ast: true, actions: false, renderer: "svg", defaultStyle: false, tooltip: false, logLevel: 1};
    try {
      charts.push(await vegaEmbed(place, spec, options));
    } catch (error) {
      place.textContent = `This chart cannot be drawn: ${error.message}`;
    }
  }
}

// Light or dark.
function setUpTheme() {
  const button = one("#theme");
  button.hidden = false;
  button.addEventListener("click", () => {
    const theme = isDark() ? "light" : "dark";
    document.documentElement.dataset.theme = theme;
    document.cookie = `theme=${theme}; path=/; max-age=31536000; samesite=strict`;
    drawCharts();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCharts);
}

// Sliders show what they choose, and ask for it when they are let go.
function setUpSliders() {
  for (const slider of all("input[type=range]")) {
    const box = document.getElementById(slider.dataset.for);
    slider.hidden = false;
    slider.addEventListener("input", () => { box.value = slider.value; });
    box.addEventListener("input", () => { slider.value = box.value; });
    slider.addEventListener("change", () => box.form.requestSubmit());
  }
}

// Keys: / searches, j and k (or arrows) walk through a table, left and right through the pages beside this one.
function rowFrom(row, step) {
  const rows = all("table.grid tbody tr");
  return row ? rows[rows.indexOf(row) + step] : step > 0 ? rows[0] : undefined;
}

function walk(step, isArrow) {
  const row = document.activeElement.closest("table.grid tbody tr");
  if (isArrow && !row) return false;
  const next = rowFrom(row, step);
  if (next) (one("a", next) || Object.assign(next, {tabIndex: -1})).focus();
  return Boolean(next);
}

function turn(step) {
  const named = step > 0 ? /\b(next|after)\b/i : /\bbefore\b/i;
  const next = all(".beside a").find(link => named.test(link.textContent));
  if (next) location.href = next.href;
  return Boolean(next);
}

function setUpKeys() {
  document.addEventListener("keydown", event => {
    const isTyping = event.target.closest("input, select, textarea");
    if (event.ctrlKey && event.key === "Enter" && event.target.id === "sql") return event.target.form.requestSubmit();
    if (event.key === "Escape" && isTyping) return event.target.blur();
    if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
    const inText = event.target.closest(".tokens, .scroll") && !event.target.closest("tr");
    const keys = {
      "/": () => { one("#search").focus(); return true; },
      j: () => walk(1, false), k: () => walk(-1, false),
      ArrowDown: () => walk(1, true), ArrowUp: () => walk(-1, true),
      ArrowRight: () => !inText && turn(1), ArrowLeft: () => !inText && turn(-1),
    };
    if (keys[event.key] && keys[event.key]()) event.preventDefault();
  });
}

// One-line texts begin where their marked token is in view.
function showMarked() {
  for (const text of all(".contexts:not(.wraps) .tokens")) {
    const token = one(".marked", text);
    if (token) text.scrollLeft += token.getBoundingClientRect().left - text.getBoundingClientRect().left - text.clientWidth * 0.6;
  }
}

// A run that publishes while one reads.
function watchTables() {
  const shown = document.body.dataset.generation;
  setInterval(async () => {
    if (document.hidden) return;
    try {
      const answer = await (await fetch("/generation")).json();
      one("#news").hidden = !shown || answer.generation === shown;
    } catch { /* The explorer was closed: there is no news. */ }
  }, 4000);
}

// The console: names at hand, history, cancel.
function setUpConsole() {
  const editor = one("#sql");
  if (!editor) return;
  const list = one("#history");
  const kept = () => JSON.parse(localStorage.getItem("functok-sql") || "[]");
  for (const sql of kept()) {
    const entry = document.createElement("button");
    entry.type = "button";
    entry.textContent = sql;
    entry.addEventListener("click", () => { editor.value = sql; editor.focus(); });
    one("ul", list).append(Object.assign(document.createElement("li")), entry);
  }
  list.hidden = !kept().length;
  for (const name of all("aside .table code")) {
    name.addEventListener("click", event => {
      if (name.closest("summary") && !event.shiftKey) return;
      editor.setRangeText(name.textContent, editor.selectionStart, editor.selectionEnd, "end");
      editor.focus();
    });
  }
  const cancel = one("#cancel");
  cancel.addEventListener("click", () => { window.stop(); cancel.hidden = true; });
  addEventListener("pageshow", () => { cancel.hidden = true; });
  editor.form.addEventListener("submit", () => {
    // As it is now: other windows run queries too.
    const texts = [editor.value, ...kept().filter(sql => sql !== editor.value)].slice(0, 50);
    localStorage.setItem("functok-sql", JSON.stringify(texts));
    cancel.hidden = false;
  });
}

setUpTheme();
setUpSliders();
setUpKeys();
showMarked();
watchTables();
setUpConsole();
drawCharts();
