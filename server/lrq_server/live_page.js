"use strict";
// What a server says of itself, drawn. Texts from the server are only ever put in as text.
const EVERY_MS = 2000;
const KEPT = 150;
const WIDTH = 900, HEIGHT = 200, LEFT = 64;
const samples = [];
let before = null;

// Prometheus's text -> name -> [{labels, value}].
function parsed(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const match = /^([a-zA-Z_:][\w:]*)(\{.*\})? (\S+)$/.exec(line);
    if (!match) continue;
    const labels = {};
    for (const [, name, value] of (match[2] || "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) labels[name] = value;
    if (!found.has(match[1])) found.set(match[1], []);
    found.get(match[1]).push({ labels, value: Number(match[3].replace("Inf", "Infinity")) });
  }
  return found;
}

function total(metrics, name) {
  return (metrics.get(name) || []).reduce((sum, one) => sum + one.value, 0);
}

// Median in ms of what a histogram in seconds took up since then; null if nothing.
function median(metrics, then, name) {
  const counts = new Map();
  for (const [source, sign] of [[metrics, 1], [then, -1]]) {
    for (const { labels, value } of source.get(`${name}_bucket`) || []) {
      const edge = labels.le === "+Inf" ? Infinity : Number(labels.le);
      counts.set(edge, (counts.get(edge) || 0) + sign * value);
    }
  }
  const edges = [...counts.keys()].sort((a, b) => a - b);
  const all = edges.length ? counts.get(edges[edges.length - 1]) : 0;
  if (!(all > 0)) return null;
  let low = 0, below = 0;
  for (const edge of edges) {
    const here = counts.get(edge);
    if (here >= all / 2) return 1000 * (edge === Infinity ? low : low + (edge - low) * (all / 2 - below) / (here - below));
    low = edge;
    below = here;
  }
  return null;
}

function sample(metrics, then, seconds) {
  const rate = (name) => Math.max(0, total(metrics, name) - total(then, name)) / seconds;
  return {
    output: rate("vllm:generation_tokens_total"),
    prompt: rate("vllm:prompt_tokens_total"),
    first: median(metrics, then, "vllm:time_to_first_token_seconds"),
    later: median(metrics, then, "vllm:inter_token_latency_seconds"),
    cache: 100 * total(metrics, "vllm:kv_cache_usage_perc"),
  };
}

function shown(value, digits = 0) {
  return value === null ? "\u2013" : value.toLocaleString("en", { maximumFractionDigits: digits });
}

function svg(name, attributes, words) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (words !== undefined) made.textContent = words;
  return made;
}

// The next of 1, 2, 4, 5 and 10 times a power of ten.
function roundAbove(value) {
  const unit = 10 ** Math.floor(Math.log10(value));
  return unit * [1, 2, 4, 5, 10].find((times) => times * unit >= value);
}

// Lines of the keys of all samples; null leaves a gap.
function draw(id, keys, least) {
  const values = samples.flatMap((one) => keys.map((key) => one[key])).filter((value) => value !== null);
  const top = roundAbove(Math.max(least, ...values));
  const x = (place) => LEFT + (WIDTH - LEFT) * (place + KEPT - samples.length) / (KEPT - 1);
  const y = (value) => HEIGHT - HEIGHT * value / top;
  const picture = svg("svg", { viewBox: `0 -8 ${WIDTH} ${HEIGHT + 32}`, role: "img", "aria-label": id });
  const when = { y: HEIGHT + 18, "font-size": 12, fill: "var(--muted)" };
  picture.append(svg("text", { ...when, x: LEFT }, `${Math.round(KEPT * EVERY_MS / 60000)} minutes ago`));
  picture.append(svg("text", { ...when, x: WIDTH, "text-anchor": "end" }, "now"));
  for (const part of [0, 0.5, 1]) {
    const at = y(part * top);
    picture.append(svg("line", { x1: LEFT, x2: WIDTH, y1: at, y2: at, stroke: "var(--line)" }));
    const words = { x: LEFT - 8, y: at + 4, "text-anchor": "end", "font-size": 12, fill: "var(--muted)" };
    picture.append(svg("text", words, shown(part * top, top < 10 ? 1 : 0)));
  }
  keys.forEach((key, index) => {
    let path = "", on = false;
    samples.forEach((one, place) => {
      if (one[key] !== null) path += `${on ? "L" : "M"}${x(place).toFixed(1)} ${y(one[key]).toFixed(1)}`;
      on = one[key] !== null;
    });
    const colour = `var(--${["after", "before"][index]})`;
    picture.append(svg("path", { d: path, fill: "none", stroke: colour, "stroke-width": 2, "stroke-linecap": "round" }));
  });
  document.getElementById(id).replaceChildren(picture);
}

function rows(headings, lines) {
  const table = document.createElement("table");
  for (const [kind, cells] of [["th", headings], ...lines.map((line) => ["td", line])]) {
    const row = table.insertRow();
    cells.forEach((words, place) => {
      const cell = row.appendChild(document.createElement(kind));
      cell.textContent = words;
      if (place === 0) cell.className = "text";
    });
  }
  const scroll = document.createElement("div");
  scroll.className = "scroll";
  scroll.append(table);
  return scroll;
}

function showClipping(metrics) {
  const shares = (metrics.get("lrq_clipped_share") || []).sort((a, b) => b.value - a.value).slice(0, 12);
  if (!shares.length) return;
  const lines = shares.map((one) => [one.labels.module, `${shown(100 * one.value, 3)}%`]);
  document.getElementById("clipping").replaceChildren(rows(["layer", "clipped"], lines));
}

function showInfo(info) {
  document.querySelector("h1").textContent = info.model.names.join(", ");
  document.querySelector("header p:last-child").textContent =
    `${info.scheme}, keys and values in ${info.kv_bits} bits, vLLM ${info.vllm_version}, self-test ${info.self_test.result}`;
  const counts = new Map();
  for (const kernel of Object.values(info.kernels)) counts.set(kernel, (counts.get(kernel) || 0) + 1);
  document.getElementById("kernels").replaceChildren(rows(["kernel", "layers"], [...counts].map(([name, n]) => [name, String(n)])));
  const error = (value) => (value === null ? "\u2013" : value.toExponential(2));
  const blocks = info.quality ? info.quality.blocks : [];
  const lines = blocks.map((one) => [String(one.block), error(one.error_before), error(one.error_after)]);
  const about = document.createElement("p");
  about.textContent = info.quality ? `Quantized by ${info.quality.method}.` : "The checkpoint has no report.";
  document.getElementById("quality").replaceChildren(about, ...(lines.length ? [rows(["block", "before", "after"], lines)] : []));
}

async function askInfo(key) {
  const form = document.getElementById("ask");
  const answer = await fetch("info", key ? { headers: { Authorization: `Bearer ${key}` } } : {});
  form.hidden = answer.ok;
  if (answer.ok) showInfo(await answer.json());
}

async function look() {
  try {
    const answer = await fetch("../metrics");
    if (!answer.ok) throw new Error(`HTTP ${answer.status}`);
    const metrics = parsed(await answer.text()), now = performance.now();
    if (before) samples.push(sample(metrics, before.metrics, (now - before.now) / 1000));
    before = { metrics, now };
    if (samples.length > KEPT) samples.shift();
    show(metrics);
    document.title = "lrq-server";
  } catch (error) {
    document.title = `lrq-server: no answer (${error.message})`;
  }
  setTimeout(look, EVERY_MS);
}

function show(metrics) {
  const last = samples[samples.length - 1];
  if (!last) return;
  const running = total(metrics, "vllm:num_requests_running"), waiting = total(metrics, "vllm:num_requests_waiting");
  const values = [
    shown(last.output), last.first === null ? "\u2013" : `${shown(last.first, 1)} ms`, `${shown(last.cache, 1)}%`,
    `${shown(running)} + ${shown(waiting)}`,
  ];
  document.querySelectorAll(".tiles .value").forEach((tile, place) => { tile.textContent = values[place]; });
  draw("throughput", ["output", "prompt"], 1);
  draw("latency", ["later", "first"], 1);
  draw("cache", ["cache"], 1);
  showClipping(metrics);
}

document.getElementById("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  askInfo(event.target.querySelector("input").value);
});
if (document.getElementById("ask").hidden) askInfo("");
look();
