// The painted photo. The browser paints it, so that opacity, outlines, names, thresholds and a class alone need no server.
// It must look like `ldvc.visualize.overlay`: change both together. Names only become text (`textContent`, `fillText`).
// `props.answer` is the data from the server. `props.value` has the visitor's settings: opacity, outline, names, alone (a name
// or null), background (the threshold of "none of these"; "default" = the model's threshold, null = not allowed), and thresholds
// of single classes by name.
const find = (selector) => element.querySelector(selector);
const [figure, canvas, tip, legend] = [".ldvc-viewer", "canvas", ".ldvc-tip", ".ldvc-legend"].map(find);
const [opacity, outline, names, background, threshold] = [".opacity", ".outline", ".names", ".background", ".threshold"].map(find);
const [ownPanel, ownThreshold, ownNumber, reset] = ["", " input", " span", " button"].map((part) => find(`.ldvc-own-threshold${part}`));
const context = canvas.getContext("2d", { willReadFrequently: true });
const NONE = -1;
const MANY = 12; // above this number of classes the legend is sorted by area
const DEFAULT = "default";
const LETTERS = 15; // size of the names on the photo, in pixels of the page
const PART = 5; // see `placeFor`
let answer = null; // the painted answer
let photo, grey, best, scores; // decoded from the answer, per pixel: RGBA, luminance, best class, its score in 0..255
let label; // per pixel: the painted class, or NONE
let hovered = null; // class under the pointer in the legend
let count = 0; // number of answers, to drop an older one

const pixels = async (uri, width, height) => {
  const image = new Image();
  image.src = uri;
  await image.decode();
  const sheet = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  sheet.drawImage(image, 0, 0, width, height);
  return sheet.getImageData(0, 0, width, height).data;
};
// Class numbers are bytes, not a picture: some browsers change pixels that are read from a canvas, against fingerprinting.
const unpack = async (packed) => {
  const compressed = Uint8Array.from(atob(packed), (each) => each.charCodeAt(0));
  const stream = new Blob([compressed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const values = new Uint8Array(await new Response(stream).arrayBuffer());
  for (let i = 1; i < values.length; i++) values[i] += values[i - 1]; // differences of neighbours were sent
  return values;
};
const rgb = (colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
const percent = (share) => (share > 0 && share < 0.01 ? "<1\u202f%" : `${Math.round(share * 100)}\u202f%`);
const limit = () => {
  const wanted = props.value.background;
  return wanted === DEFAULT ? answer.own_threshold : wanted;
};
const hasOwn = (name) => limit() !== null && Object.hasOwn(props.value.thresholds, name);
const limitOf = (name) => (hasOwn(name) ? props.value.thresholds[name] : limit());
const aloneIndex = () => answer.classes.findIndex((each) => each.name === props.value.alone);

const paint = () => {
  const { width, height, classes } = answer;
  const only = hovered ?? aloneIndex();
  const view = only < 0 ? label : label.map((value) => (value === only ? only : NONE));
  const amount = props.value.opacity;
  const muted = 0.5 * Math.min(1, amount / answer.usual_opacity);
  const period = Math.max(8, Math.round(Math.max(width, height) / 60));
  const paints = classes.map((each) => rgb(each.colour));
  const areas = new Uint32Array(classes.length); // in pixels
  const out = context.createImageData(width, height);
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      const value = view[i];
      const at = 4 * i;
      const colour = value < 0 ? null : paints[value];
      if (colour) areas[value] += 1;
      const striped = colour && !classes[value].seen && (x + y) % period < period * 0.4;
      const strength = striped ? amount * 0.6 : amount;
      const edge = props.value.outline &&
        ((x > 0 && view[i - 1] !== value) || (x + 1 < width && view[i + 1] !== value) ||
          (y > 0 && view[i - width] !== value) || (y + 1 < height && view[i + width] !== value));
      for (let c = 0; c < 3; c++) {
        let mixed = 0.5 * grey[i] + 40;
        if (colour) mixed = (photo[at + c] * (1 - muted) + grey[i] * muted) * (1 - strength) + colour[c] * strength;
        out.data[at + c] = edge ? 0.25 * mixed + 191.25 : mixed;
      }
      out.data[at + 3] = 255;
    }
  }
  context.putImageData(out, 0, 0);
  if (props.value.names) writeNames(view, areas);
};

// A name is written where its class has the most room, if it fits.
const writeNames = (view, areas) => {
  const size = Math.round(LETTERS * Math.max(1, canvas.width / (canvas.clientWidth || canvas.width)));
  context.font = `600 ${size}px ${getComputedStyle(canvas).fontFamily}`;
  Object.assign(context, { textAlign: "center", textBaseline: "middle", lineJoin: "round", lineWidth: size / 4 });
  Object.assign(context, { strokeStyle: "#14161c", fillStyle: "white" });
  answer.classes.forEach(({ name }, index) => {
    const [height, width] = [1.3 * size, context.measureText(name).width + 0.6 * size];
    const place = areas[index] < height * width ? null : placeFor(height, width, view, index);
    if (place === null) return;
    context.strokeText(name, ...place);
    context.fillText(name, ...place);
  });
};
// The centre [x, y] of the largest box of these proportions inside a class, or null if the box does not fit. On a grid
// whose cells are the box divided by PART, `depth` is 1 at the edge of the class, 2 one cell further in, and so on.
const placeFor = (boxHeight, boxWidth, view, index) => {
  const at = (cell, length) => Math.floor(((cell - 0.5) * length) / PART); // cells count from 1
  const [rows, columns] = [[answer.height, boxHeight], [answer.width, boxWidth]].map(([side, length]) => Math.floor((side * PART) / length));
  const row = columns + 2; // with a border of zeros
  const depth = new Uint16Array((rows + 2) * row);
  for (let y = 1; y <= rows; y++) {
    const line = at(y, boxHeight) * answer.width;
    for (let x = 1, i = y * row + 1; x <= columns; x++, i++) {
      if (view[line + at(x, boxWidth)] !== index) continue;
      depth[i] = 1 + Math.min(depth[i - 1], depth[i - row - 1], depth[i - row], depth[i - row + 1]);
    }
  }
  let [deepest, deepestCells] = [Math.ceil((PART + 1) / 2), []];
  for (let y = rows; y > 0; y--) {
    for (let x = columns, i = y * row + columns; x > 0; x--, i--) {
      depth[i] = Math.min(depth[i], 1 + Math.min(depth[i + 1], depth[i + row - 1], depth[i + row], depth[i + row + 1]));
      if (depth[i] > deepest) [deepest, deepestCells] = [depth[i], []];
      if (depth[i] === deepest) deepestCells.push([at(x, boxWidth), at(y, boxHeight)]);
    }
  }
  if (!deepestCells.length) return null;
  const middle = [0, 1].map((axis) => deepestCells.reduce((sum, each) => sum + each[axis], 0) / deepestCells.length);
  const distance = (each) => Math.hypot(each[0] - middle[0], each[1] - middle[1]);
  return deepestCells.reduce((best, each) => (distance(each) < distance(best) ? each : best));
};

const draw = () => {
  if (!answer) return;
  const { classes } = answer;
  const least = classes.map(({ name }) => limitOf(name) * 255); // null becomes 0
  label = Int16Array.from(best, (value, i) => (scores[i] < least[value] ? NONE : value));
  paint();
  const shares = new Float64Array(classes.length + 1);
  for (const value of label) shares[value < 0 ? classes.length : value] += 1 / label.length;
  for (const line of legend.children) {
    const index = Number(line.dataset.index);
    line.querySelector(".ldvc-share").textContent = percent(shares[index]);
    line.querySelector("i").style.width = `${100 * shares[index]}%`;
    line.classList.toggle("ldvc-absent", shares[index] === 0);
    const isOwn = index < classes.length && hasOwn(classes[index].name);
    line.querySelector(".ldvc-name").dataset.own = isOwn ? ` ≥ ${limitOf(classes[index].name).toFixed(2)}` : "";
    line.querySelector("button")?.setAttribute("aria-pressed", index === aloneIndex());
    line.hidden = index === classes.length && limit() === null;
  }
  const largest = classes.map((each, index) => [each.name, shares[index]]).sort((a, b) => b[1] - a[1]).slice(0, 8);
  const text = largest.map(([name, share]) => `${name} ${percent(share)}`).join(", ");
  canvas.setAttribute("aria-label", `The photo painted by class: ${text}`);
  showOwn();
  threshold.parentElement.hidden = limit() === null;
  find("output").textContent = Number(threshold.value).toFixed(2);
  element.dataset.drawn = `${count}`;
};

// The threshold slider of the class that is shown alone, below its line in the legend.
const showOwn = () => {
  const { alone } = props.value;
  const line = legend.querySelector(`[data-index="${aloneIndex()}"]`);
  ownPanel.hidden = limit() === null || !line;
  if (ownPanel.hidden) return;
  if (ownPanel.parentElement !== line) line.append(ownPanel);
  ownThreshold.value = limitOf(alone);
  ownNumber.textContent = limitOf(alone).toFixed(2);
  reset.hidden = !hasOwn(alone);
};

const drawSoon = () => requestAnimationFrame(draw);
const change = (settings) => {
  props.value = { ...props.value, ...settings };
  drawSoon();
};
const press = (name) => {
  hovered = null;
  change({ alone: props.value.alone === name ? null : name });
};
const hover = (index) => {
  hovered = index;
  drawSoon();
};

const line = (entry, index) => {
  const item = document.createElement("li");
  item.dataset.index = index;
  const row = document.createElement(entry.seen === null ? "span" : "button");
  row.className = "ldvc-entry";
  const part = (kind, className, text = "") => {
    const child = row.appendChild(document.createElement(kind));
    child.className = className;
    child.textContent = text;
    return child;
  };
  part("span", `ldvc-swatch${entry.seen === false ? " ldvc-striped" : ""}`);
  part("span", "ldvc-name", entry.title).title = entry.title;
  const tag = entry.seen === null ? "" : entry.seen ? "seen" : "unseen";
  part("span", tag && `ldvc-tag ldvc-${tag}`, tag);
  part("span", "ldvc-bar").appendChild(document.createElement("i"));
  part("span", "ldvc-share");
  row.style.setProperty("--c", entry.colour);
  if (entry.seen !== null) {
    row.type = "button";
    row.addEventListener("click", () => press(entry.name));
    row.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && hover(index));
    row.addEventListener("pointerleave", () => hovered !== null && hover(null));
  }
  item.appendChild(row);
  return item;
};

// The controls show the settings. The server may change settings that do not fit a new answer.
const showSettings = () => {
  opacity.value = 100 * props.value.opacity;
  outline.checked = props.value.outline;
  names.checked = props.value.names;
  background.checked = props.value.background !== null;
  if (answer && limit() !== null) threshold.value = limit();
};

const showAnswer = async () => {
  const next = props.answer;
  const number = ++count;
  figure.hidden = !next;
  if (!next) {
    answer = null;
    return;
  }
  const decoded = await Promise.all([pixels(next.photo, next.width, next.height), unpack(next.labels), unpack(next.scores)]);
  if (number !== count) return;
  [answer, hovered, photo, best, scores] = [next, null, ...decoded];
  grey = Float32Array.from(best, (_, i) => 0.299 * photo[4 * i] + 0.587 * photo[4 * i + 1] + 0.114 * photo[4 * i + 2]);
  [canvas.width, canvas.height] = [next.width, next.height];
  const lines = [...next.classes, { title: next.none, seen: null, colour: next.none_colour }].map(line);
  if (next.classes.length > MANY) { // in a long list, the classes in the photo come first
    const counts = new Uint32Array(next.classes.length + 1);
    const least = next.classes.map(({ name }) => limitOf(name) * 255);
    best.forEach((value, i) => { if (scores[i] >= least[value]) counts[value] += 1; });
    const rank = (item) => (Number(item.dataset.index) === next.classes.length ? -1 : counts[item.dataset.index]);
    lines.sort((a, b) => rank(b) - rank(a));
  }
  legend.replaceChildren(...lines);
  find(".ldvc-footnote").textContent = next.note;
  if (limit() === null) threshold.value = next.own_threshold;
  showSettings();
  draw();
};

opacity.addEventListener("input", () => change({ opacity: opacity.value / 100 }));
outline.addEventListener("input", () => change({ outline: outline.checked }));
names.addEventListener("input", () => change({ names: names.checked }));
ownThreshold.addEventListener("input", () => {
  change({ thresholds: { ...props.value.thresholds, [props.value.alone]: Number(ownThreshold.value) } });
});
reset.addEventListener("click", () => {
  const { [props.value.alone]: _, ...others } = props.value.thresholds;
  change({ thresholds: others });
  ownThreshold.focus(); // because the button becomes hidden
});
for (const control of [background, threshold]) {
  control.addEventListener("input", () => {
    const value = Number(threshold.value);
    const isDefault = Math.abs(value - answer.own_threshold) < 0.005; // the slider has steps of 0.01
    change({ background: !background.checked ? null : isDefault ? DEFAULT : value });
  });
}

const pixelAt = (event) => {
  const box = canvas.getBoundingClientRect();
  const x = Math.floor(((event.clientX - box.left) / box.width) * canvas.width);
  const y = Math.floor(((event.clientY - box.top) / box.height) * canvas.height);
  const inside = x >= 0 && y >= 0 && x < canvas.width && y < canvas.height;
  return answer && inside ? y * canvas.width + x : null;
};
canvas.addEventListener("pointermove", (event) => {
  const at = pixelAt(event);
  tip.hidden = at === null;
  if (at === null) return;
  tip.textContent = `${label[at] < 0 ? answer.none : answer.classes[label[at]].title} · ${(scores[at] / 255).toFixed(2)}`;
  const box = canvas.parentElement.getBoundingClientRect();
  tip.style.left = `${Math.min(event.clientX - box.left + 14, box.width - tip.offsetWidth - 4)}px`;
  tip.style.top = `${Math.max(event.clientY - box.top - 34, 4)}px`;
});
canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
canvas.addEventListener("click", (event) => {
  const at = pixelAt(event);
  if (at !== null && label[at] >= 0) press(answer.classes[label[at]].name);
});
document.addEventListener("keydown", (event) => {
  const open = element.isConnected && element.offsetParent !== null; // the tab is open
  if (event.key !== "Escape" || !answer || props.value.alone === null || !open) return;
  if (ownPanel.contains(document.activeElement)) ownPanel.previousElementSibling.focus(); // the slider becomes hidden
  press(props.value.alone);
});

new ResizeObserver(drawSoon).observe(canvas); // the size of the names depends on it
// Gradio takes a quoted word in this script for the name of an event, so the prop has its name without quotes.
watch(Object.keys({ answer }), showAnswer);
showAnswer();
