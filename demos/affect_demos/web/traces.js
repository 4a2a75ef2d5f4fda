// What is drawn: the picture with its faces, and the last minute as lines.

const SPAN_S = 60;
const LEFT = 44; // room for the scale
const LONGEST_LINE_S = 1.5; // points further apart are a gap, and a gap is drawn as one
const NAMES = ["--valence", "--arousal", "--closure", "--perclos", "--held", "--text", "--dim", "--rule", "--back", "--warn"];
const RIBBON = ["#999999", "#e69f00", "#56b4e9", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#f0e442"];

let colours = {};
export function readColours() {
  const style = getComputedStyle(document.documentElement);
  colours = Object.fromEntries(NAMES.map((name) => [name.slice(2), style.getPropertyValue(name).trim()]));
}

// A canvas of as many pixels as the screen has there; false while it is not shown.
function sized(canvas) {
  const scale = Math.min(3, window.devicePixelRatio || 1);
  const width = Math.round(canvas.clientWidth * scale);
  const height = Math.round(canvas.clientHeight * scale);
  if (!width || !height) return null;
  if (canvas.width !== width || canvas.height !== height) {
    canvas.width = width;
    canvas.height = height;
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  return { pen, width: width / scale, height: height / scale };
}

export function drawPicture(canvas, picture, about, faces, stale) {
  const area = sized(canvas);
  if (!area || !picture) return;
  const { pen, width, height } = area;
  const zoom = Math.min(width / about.width, height / about.height);
  const left = (width - about.width * zoom) / 2;
  const top = (height - about.height * zoom) / 2;
  pen.imageSmoothingQuality = "high";
  pen.globalAlpha = stale ? 0.45 : 1;
  pen.drawImage(picture, left, top, about.width * zoom, about.height * zoom);
  pen.globalAlpha = 1;
  for (const face of faces) if (face.box) drawFace(pen, face, left, top, zoom, { left, top, right: left + about.width * zoom, bottom: top + about.height * zoom });
  if (stale) {
    pen.font = "600 18px system-ui, sans-serif";
    label(pen, "No new picture", width / 2, height / 2, "#12161e", "#f0e442", true);
  }
}

function drawFace(pen, face, left, top, zoom, edge) {
  const clamp = (value, low, high) => Math.max(low, Math.min(high, value));
  const [x, y, w, h] = face.box;
  const x0 = clamp(left + x * zoom, edge.left + 2, edge.right - 2);
  const x1 = clamp(left + (x + w) * zoom, edge.left + 2, edge.right - 2);
  const y0 = clamp(top + y * zoom, edge.top + 2, edge.bottom - 2);
  const y1 = clamp(top + (y + h) * zoom, edge.top + 2, edge.bottom - 2);
  // On the picture the dark page's colours, whatever the page's are.
  const colour = face.held ? "#c3cad5" : face.main ? "#56b4e9" : "#c3cad5";
  const arm = Math.max(8, (x1 - x0) / 5);
  pen.strokeStyle = colour;
  pen.lineWidth = 3;
  pen.lineCap = "round";
  pen.setLineDash(face.held ? [2, 7] : []);
  pen.beginPath();
  for (const [cx, cy, dx, dy] of [[x0, y0, arm, arm], [x1, y0, -arm, arm], [x0, y1, arm, -arm], [x1, y1, -arm, -arm]]) {
    pen.moveTo(cx + dx, cy);
    pen.lineTo(cx, cy);
    pen.lineTo(cx, cy + dy);
  }
  pen.stroke();
  pen.setLineDash([]);
  const words = [`face ${face.id}`];
  if (face.held) words.push("held");
  if (face.expression) words.push(`${face.expression} ${Math.round(face.share * 100)} %`);
  pen.font = "600 13px system-ui, sans-serif";
  const text = words.join(" · ");
  const wide = pen.measureText(text).width + 16;
  const lx = clamp(x0, edge.left + 4, Math.max(edge.left + 4, edge.right - wide - 4));
  const ly = y0 - edge.top > 32 ? y0 - 18 : clamp(y1 + 18, edge.top, edge.bottom - 16);
  label(pen, text, lx, ly, "#0d1117", colour, false);
}

function label(pen, text, x, y, ink, paper, centred) {
  const wide = pen.measureText(text).width + 16;
  const left = centred ? x - wide / 2 : x;
  pen.fillStyle = paper;
  pen.beginPath();
  pen.roundRect(left, y - 13, wide, 25, 6);
  pen.fill();
  pen.fillStyle = ink;
  pen.textBaseline = "middle";
  pen.fillText(text, left + 8, y);
}

// Samples: [time, valence, arousal, eye closure, PERCLOS, expression, held, face]
function line(pen, samples, which, place, colour, dashed) {
  let before = null, held = null;
  const stroke = () => held !== null && pen.stroke();
  for (const sample of samples) {
    const value = sample[which];
    const joined = before && value !== null && sample[7] === before[7] && sample[0] - before[0] < LONGEST_LINE_S;
    if (!joined || sample[6] !== held) {
      stroke();
      held = joined ? sample[6] : null;
      if (joined) {
        pen.strokeStyle = held ? colours.held : colour;
        pen.setLineDash(held ? [2, 4] : dashed);
        pen.beginPath();
        pen.moveTo(...place(before));
      }
    }
    if (joined) pen.lineTo(...place(sample));
    before = value === null ? null : sample;
  }
  stroke();
  if (before && samples.length && before === samples[samples.length - 1]) {
    pen.setLineDash([]);
    pen.fillStyle = before[6] ? colours.held : colour;
    pen.beginPath();
    pen.arc(...place(before), 3.5, 0, 7);
    pen.fill();
  }
}

export function drawLines(canvas, samples, now, low, high, lines, mark) {
  const area = sized(canvas);
  if (!area) return;
  const { pen, width, height } = area;
  const x = (t) => LEFT + (1 - (now - t) / SPAN_S) * (width - LEFT - 8);
  const y = (value) => 10 + (high - Math.max(low, Math.min(high, value))) / (high - low) * (height - 28);
  pen.font = "11px system-ui, sans-serif";
  pen.textBaseline = "middle";
  pen.lineWidth = 1;
  pen.fillStyle = colours.dim;
  pen.strokeStyle = colours.rule;
  for (const value of [low, (low + high) / 2, high]) {
    pen.beginPath();
    pen.moveTo(LEFT, y(value));
    pen.lineTo(width - 8, y(value));
    pen.stroke();
    const text = low < 0 ? (value > 0 ? `+${value}` : `${value}`.replace("-", "−")) : `${value * 100} %`;
    pen.fillText(text, 4, y(value));
  }
  for (const ago of [45, 30, 15]) pen.fillText(`−${ago} s`, x(now - ago) - 12, height - 8);
  if (mark !== undefined) {
    pen.setLineDash([6, 4]);
    pen.strokeStyle = colours.dim;
    pen.beginPath();
    pen.moveTo(LEFT, y(mark));
    pen.lineTo(width - 8, y(mark));
    pen.stroke();
  }
  pen.lineWidth = 2;
  pen.lineJoin = "round";
  pen.lineCap = "butt";
  const shown = samples.filter((sample) => sample[0] >= now - SPAN_S);
  for (const [which, name, dashed] of lines) line(pen, shown, which, (s) => [x(s[0]), y(s[which])], colours[name], dashed);
}

export function drawRibbon(canvas, samples, now, labels) {
  const area = sized(canvas);
  if (!area) return;
  const { pen, width, height } = area;
  const x = (t) => LEFT + (1 - (now - t) / SPAN_S) * (width - LEFT - 8);
  let before = null;
  for (const sample of samples) {
    if (before && before[5] && sample[0] >= now - SPAN_S && sample[0] - before[0] < LONGEST_LINE_S) {
      const from = Math.max(LEFT, x(before[0]));
      pen.fillStyle = ribbonColour(labels, before[5]);
      // What is only held is a thin line.
      const tall = before[6] ? 2 : height - 8;
      pen.fillRect(from, (height - tall) / 2, x(sample[0]) - from + 0.6, tall);
    }
    before = sample;
  }
}

export function ribbonColour(labels, label) {
  return RIBBON[Math.max(0, labels.indexOf(label)) % RIBBON.length];
}
