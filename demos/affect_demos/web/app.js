// The live page: one websocket, texts are news and binary messages are pictures.
import { drawLines, drawPicture, drawRibbon, readColours, ribbonColour } from "/traces.js";

const KEEP_S = 62;
const QUIET_MS = 4000; // between two announcements of a changed expression
const $ = (id) => document.getElementById(id);
const calm = matchMedia("(prefers-reduced-motion: reduce)");

const view = { samples: [], events: [], labels: [], about: {}, status: {}, now: null, picture: null, head: null };
let paused = false, due = false, socket = null, retry_ms = 500, announced = { text: "", at: -QUIET_MS }, waiting = null;
let farewell = "", tableAt = 0, tracesAt = 0;

// The token has done its work: out of the address bar, the history and screenshots.
if (location.search) history.replaceState(null, "", location.pathname);

function set(id, text) {
  const element = $(id);
  if (element.textContent !== text) element.textContent = text;
}

const minutes = (s, digits = 1) => `${Math.floor(s / 60)}:${(s % 60).toFixed(digits).padStart(digits ? 3 + digits : 2, "0")}`;
const percent = (share, digits = 0) => (share === null || share === undefined ? "–" : `${(share * 100).toFixed(digits)} %`);
const signed = (value) => (value === null || value === undefined ? "–" : `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`);
const plain = (value) => (value === null || value === undefined ? "–" : value.toFixed(2));

// ---- what comes in

function connect() {
  socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/live`);
  socket.binaryType = "arraybuffer";
  let fresh = true;
  socket.onmessage = async ({ data }) => {
    if (typeof data === "string") {
      take(JSON.parse(data), fresh);
      farewell = "";
      fresh = false;
      retry_ms = 500;
    } else {
      await show(data);
    }
  };
  socket.onclose = (event) => {
    if (event.code === 1001 && event.reason === "ended") farewell = "The program was ended. What is shown is the last that came.";
    state("away", farewell || "No connection to the program; trying again.");
    setTimeout(connect, retry_ms);
    retry_ms = Math.min(8000, retry_ms * 2);
  };
}

function take(news, fresh) {
  if (fresh) Object.assign(view, { samples: [], events: [] });
  view.samples.push(...(news.samples || []));
  const last = view.samples.at(-1);
  while (last && view.samples[0][0] < last[0] - KEEP_S) view.samples.shift();
  if (news.about) about(news.about);
  for (const event of news.events || []) {
    view.events.unshift(event);
    if (!fresh) announceEvent(event);
  }
  view.events.length = Math.min(view.events.length, 50);
  if (news.now) {
    view.now = news.now;
    if (news.now.shares.length) view.labels = news.now.shares.map(([label]) => label);
  }
  if (news.status) {
    view.status = news.status;
    state(news.status.state, news.status.words);
  }
  redraw();
}

async function show(data) {
  const length = new DataView(data).getUint32(0);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
  const picture = await createImageBitmap(new Blob([new Uint8Array(data, 4 + length)], { type: "image/jpeg" }));
  if (paused) {
    picture.close();
  } else {
    if (view.picture) view.picture.close();
    Object.assign(view, { picture, head });
    $("picture").parentElement.style.aspectRatio = `${head.width} / ${head.height}`;
    document.documentElement.dataset.pictures = Number(document.documentElement.dataset.pictures || 0) + 1;
    redraw();
  }
  // Told once it is drawn, so that a slow page is sent fewer, and never old ones.
  requestAnimationFrame(() => socket.readyState === WebSocket.OPEN && socket.send("drawn"));
}

// ---- what is said once

function about(facts) {
  view.about = facts;
  set("heading", `${facts.model} for ${facts.target}, `);
  set("source", facts.source);
  set("purpose", facts.purpose);
  $("untrained").hidden = facts.trained;
  $("recording").hidden = !facts.record;
  $("not-recording").hidden = Boolean(facts.record);
  set("kept", facts.record ? `Recorded to ${facts.record} on the device.` : "Nothing is recorded; the summary is gone when the program ends.");
  const mark = document.querySelector("#perclos-meter i");
  mark.style.left = `${facts.drowsy * 100}%`;
  mark.style.display = "block";
}

const STATES = { waiting: "Waiting", playing: "Live", "no picture": "No picture", ended: "Ended", stopped: "Stopped", failed: "Failed", away: "Disconnected" };
function state(name, detail) {
  const chip = $("state");
  if (chip.dataset.state !== name) {
    chip.dataset.state = name;
    if (["ended", "failed", "no picture", "away"].includes(name)) announce(STATES[name], true);
  }
  set("state", name === "playing" && !view.about.live ? "Playing" : STATES[name] || name);
  const text = name === "ended" ? "The recording is over. The summary stays until the program ends." : detail || "";
  $("words").hidden = !text;
  set("words", text);
}

function announceEvent(event) {
  if (event.event === "expression") announce(`Face ${event.track_id}: ${event.expression}`);
  if (event.event === "source") announce(`Source ${event.kind}`);
  if (event.event === "drowsiness") alertDrowsy(event);
}

// Politely, and at most every few seconds: the newest is said, those between are not.
function announce(text, now) {
  const wait = announced.at + QUIET_MS - performance.now();
  clearTimeout(waiting);
  if (wait > 0 && !now) {
    waiting = setTimeout(() => announce(text, true), wait);
  } else if (text !== announced.text) {
    announced = { text, at: performance.now() };
    set("announce", text);
  }
}

function alertDrowsy(event) {
  const note = document.createElement("p");
  note.textContent = `Drowsiness signal, face ${event.track_id}: eyes shut for ${percent(event.perclos)} of the last minute. A signal, no diagnosis.`;
  $("alert").replaceChildren(...(event.signal ? [note] : []));
}

// ---- what is drawn

function redraw() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => {
    due = false;
    if (!paused) draw(performance.now());
  });
}

function draw(at) {
  const { now, status, samples } = view;
  const stale = Boolean(now && !now.picture) || ["no picture", "failed", "away"].includes($("state").dataset.state);
  if (view.head) {
    // Places as of the picture, words as of the panel beside it: the same figure must not read differently twice.
    const known = new Map((now ? now.faces : []).map((face) => [face.id, face]));
    const faces = view.head.faces.map((face) => ({ ...face, ...known.get(face.id), box: face.box, held: face.held }));
    drawPicture($("picture"), view.picture, view.head, stale && now ? now.faces : faces, stale);
  }
  if (!now) return;
  numbers(now);
  const period = calm.matches ? 1000 : 90;
  if (at - tracesAt >= period) {
    tracesAt = at;
    traces(samples, now.t);
  }
  if (at - tableAt >= 1000) {
    tableAt = at;
    table(samples);
  }
  if (status.session) session(status);
  events();
}

function numbers(now) {
  const main = now.faces.find((face) => face.main);
  const sample = view.samples.at(-1) || [];
  document.body.classList.toggle("is-held", Boolean(main && main.held));
  $("held").hidden = !(main && main.held);
  set("clock", minutes(now.t));
  set("faces", now.faces.length === 1 ? "1 face" : now.faces.length ? `${now.faces.length} faces` : "no face");
  set("count", `${now.faces.length}`);
  set("expression", main ? main.expression || "not named by this model" : "no face");
  set("share", main && main.expression ? percent(main.share) : "");
  bars($("bars"), now.shares.map(([label, share]) => [label, share, percent(share), main && label === main.expression]), view.labels);
  set("valence", signed(sample[1]));
  set("arousal", signed(sample[2]));
  set("closure", plain(sample[3]));
  width($("closure-meter"), sample[3]);
  set("perclos", percent(sample[4]));
  width($("perclos-meter"), sample[4]);
  set("signal", !main || sample[4] === null ? "not yet known" : main.drowsy ? "on" : "off");
  const missing = main && sample[4] === null;
  set("perclos-words", missing
    ? `Nothing to say before ${view.about.least_eyes_s} s of open view of the eyes: ${Math.floor(now.observed_s)} s so far.`
    : `Share of the last minute with eyes at least 80 % shut, blinks left out. The mark is the signal's threshold, ${percent(view.about.drowsy)}.`);
}

function width(meter, share) {
  meter.firstElementChild.style.width = `${Math.round(Math.max(0, Math.min(1, share || 0)) * 1000) / 10}%`;
}

// One row each, made once and then only changed, so that nothing flickers or loses its place.
function bars(list, rows, labels) {
  if (!rows.length && labels.length) rows = labels.map((label) => [label, 0, "–", false]);
  if (list.children.length !== rows.length || list.firstElementChild?.classList.contains("dim")) {
    list.replaceChildren(...rows.map(() => {
      const item = document.createElement("li");
      const meter = document.createElement("span");
      meter.className = "meter";
      meter.setAttribute("aria-hidden", "true");
      meter.append(document.createElement("span"));
      const value = document.createElement("span");
      value.className = "num";
      item.append(document.createElement("span"), meter, value);
      return item;
    }));
  }
  rows.forEach(([label, share, text, top], i) => {
    const item = list.children[i];
    const [name, meter, value] = item.children;
    if (name.textContent !== label) name.textContent = label;
    if (value.textContent !== text) value.textContent = text;
    item.classList.toggle("top", Boolean(top));
    width(meter, share);
  });
}

function traces(samples, t) {
  drawLines($("affect"), samples, t, -1, 1, [[2, "arousal", [7, 3]], [1, "valence", []]]);
  drawLines($("eyes"), samples, t, 0, 1, [[3, "closure", []], [4, "perclos", [7, 3]]], view.about.drowsy);
  drawRibbon($("ribbon"), samples, t, view.labels);
  const seen = [...new Set(samples.map((sample) => sample[5]).filter(Boolean))].sort((a, b) => view.labels.indexOf(a) - view.labels.indexOf(b));
  const legend = $("ribbon-legend");
  if (legend.dataset.seen !== seen.join()) {
    legend.dataset.seen = seen.join();
    legend.replaceChildren(legend.firstElementChild, ...seen.map((label) => {
      const key = document.createElement("span");
      key.className = "key swatch";
      key.textContent = label;
      key.style.borderColor = ribbonColour(view.labels, label);
      return key;
    }));
  }
}

function table(samples) {
  const rows = [["Valence (proxy)", 1, signed], ["Arousal (proxy)", 2, signed], ["Eye closure", 3, plain], ["PERCLOS (proxy)", 4, (v) => percent(v, 1)]];
  fill($("rows"), rows.map(([name, which, say]) => {
    const values = samples.filter((sample) => !sample[6]).map((sample) => sample[which]).filter((value) => value !== null);
    if (!values.length) return [name, "–", "–", "–", "–"];
    const mean = values.reduce((a, b) => a + b, 0) / values.length;
    return [name, say(samples.at(-1)[which]), say(Math.min(...values)), say(mean), say(Math.max(...values))];
  }));
}

function fill(body, rows) {
  while (body.children.length < rows.length) {
    const row = document.createElement("tr");
    rows[0].forEach((_, i) => {
      const cell = document.createElement(i ? "td" : "th");
      if (!i) cell.scope = "row";
      row.append(cell);
    });
    body.append(row);
  }
  rows.forEach((row, i) => row.forEach((text, j) => {
    const cell = body.children[i].children[j];
    if (cell.textContent !== text) cell.textContent = text;
  }));
}

const STAGES = [["detect", "Find the face"], ["encode", "Encode"], ["step", "Recurrent step"], ["total", "Whole frame"]];
function session(status) {
  const counts = status.session;
  set("fps", status.state === "playing" ? status.fps.toFixed(1) : "–");
  set("most", percent(counts.perclos.most, 1));
  set("dropped", `${counts.frames_dropped}`);
  fill($("stages"), STAGES.map(([key, name]) => [name, ...(status.latency[key] || [null, null]).map((ms) => (ms === null ? "–" : ms.toFixed(1)))]));
  const facts = [["Duration", minutes(counts.duration_s, 0)], ["Faces", `${counts.faces}`], ["PERCLOS at most", percent(counts.perclos.most, 1)], ["Held", percent(counts.held_share, 1)]];
  const list = $("facts");
  while (list.children.length < facts.length) {
    const group = document.createElement("div");
    const value = document.createElement("dd");
    value.className = "num";
    group.append(document.createElement("dt"), value);
    list.append(group);
  }
  facts.forEach(([name, value], i) => {
    const [dt, dd] = list.children[i].children;
    if (dt.textContent !== name) dt.textContent = name;
    if (dd.textContent !== value) dd.textContent = value;
  });
  const spent = Object.entries(counts.expression_s);
  const all = spent.reduce((sum, [, seconds]) => sum + seconds, 0);
  if (all) bars($("times"), spent.slice(0, 5).map(([label, seconds]) => [label, seconds / all, minutes(seconds, 0), false]), []);
}

const SAID = {
  face: (e) => `face ${e.track_id} is here`,
  gone: (e) => `face ${e.track_id} is gone, after ${minutes(e.present_s, 0)}`,
  expression: (e) => `face ${e.track_id}: ${e.was ? `${e.was} → ` : ""}${e.expression}`,
  valence: (e) => `face ${e.track_id}: valence ${signed(e.was)} → ${signed(e.valence)}`,
  arousal: (e) => `face ${e.track_id}: arousal ${signed(e.was)} → ${signed(e.arousal)}`,
  drowsiness: (e) => `face ${e.track_id}: drowsiness signal ${e.signal ? "on" : "off"}${e.perclos === null ? "" : `, PERCLOS ${percent(e.perclos)}`}`,
  source: (e) => `source ${e.kind}: ${e.detail}`,
};
let eventsShown = null;
function events() {
  const key = view.events.length ? `${view.events.length} ${view.events[0].timestamp_s} ${view.events[0].event}` : "";
  if (!view.events.length || key === eventsShown) return;
  eventsShown = key;
  $("events").replaceChildren(...view.events.map((event) => {
    const item = document.createElement("li");
    const time = document.createElement("time");
    time.textContent = minutes(event.timestamp_s);
    const text = document.createElement("span");
    text.textContent = (SAID[event.event] || (() => event.event))(event);
    item.append(time, text);
    return item;
  }));
}

// ---- the person

$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", `${paused}`);
  set("pause", paused ? "Resume" : "Pause");
  if (!paused) redraw();
});
const redo = () => {
  readColours();
  tracesAt = 0;
  if (view.now && !paused) draw(performance.now());
};
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redo);
addEventListener("resize", redo);
readColours();
connect();
