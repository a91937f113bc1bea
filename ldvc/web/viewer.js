// The painted photo: composited here, so that opacity, outlines, the threshold and a class alone answer at once.
// Draws as `ldvc.visualize.overlay` does; change both or none. Names only ever become text (`textContent`).
const find = (selector) => element.querySelector(selector);
const [figure, canvas, tip, legend] = [".ldvc-viewer", "canvas", ".ldvc-tip", ".ldvc-legend"].map(find);
const [opacity, outline, background, threshold] = [".opacity", ".outline", ".background", ".threshold"].map(find);
const context = canvas.getContext("2d", { willReadFrequently: true });
const NONE = -1;
const WISH_LASTS = 5000; // milliseconds
const MANY = 12; // classes from which on the legend is sorted by area
let shown = null; // what the server sent
let photo, grey, best, sent; // Uint8 per pixel: RGBA, luminance, score of the best class in 0..255, class + 1
let hovered = null; // class under the pointer in the legend
let alone = null; // name of the class that was pressed
let wish = null; // the threshold that was set here last, while the server may not know of it yet: { value, until }
let answer = 0; // counts answers, so that a slow picture of an older one is dropped

const pixels = async (uri, width, height) => {
  const image = new Image();
  image.src = uri;
  await image.decode();
  const sheet = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  sheet.drawImage(image, 0, 0, width, height);
  return sheet.getImageData(0, 0, width, height).data;
};
const channel = (data) => {
  const values = new Uint8Array(data.length / 4);
  for (let i = 0; i < values.length; i++) values[i] = data[4 * i];
  return values;
};
const rgb = (colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
const percent = (share) => (share > 0 && share < 0.01 ? "<1\u202f%" : `${Math.round(share * 100)}\u202f%`);

// The class of every pixel (-1 = none of these). The server decides; while a slider is dragged, the scores that it sent do.
const labels = () => {
  const found = new Int16Array(sent.length);
  const limit = background.checked ? wanted() * 255 : -1;
  const exact = wanted() === shown.threshold;
  for (let i = 0; i < found.length; i++) {
    if (exact) found[i] = sent[i] - 1;
    else found[i] = best[i] < limit ? NONE : shown.best_labels[i] - 1;
  }
  return found;
};

const draw = () => {
  if (!shown || !photo) return;
  const { width, height, classes } = shown;
  const label = labels();
  const only = hovered ?? classes.findIndex((each) => each.name === alone);
  const view = only < 0 ? label : label.map((value) => (value === only ? only : NONE));
  const amount = opacity.value / 100;
  const muted = 0.5 * Math.min(1, amount / shown.usual_opacity);
  const period = Math.max(8, Math.round(Math.max(width, height) / 60));
  const paints = classes.map((each) => rgb(each.colour));
  const out = context.createImageData(width, height);
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      const value = view[i];
      const at = 4 * i;
      const paint = value < 0 ? null : paints[value];
      const striped = paint && !classes[value].seen && (x + y) % period < period * 0.4;
      const strength = striped ? amount * 0.6 : amount;
      const edge =
        outline.checked &&
        ((x > 0 && view[i - 1] !== value) || (x + 1 < width && view[i + 1] !== value) ||
          (y > 0 && view[i - width] !== value) || (y + 1 < height && view[i + width] !== value));
      for (let c = 0; c < 3; c++) {
        let mixed = 0.5 * grey[i] + 40;
        if (paint) mixed = (photo[at + c] * (1 - muted) + grey[i] * muted) * (1 - strength) + paint[c] * strength;
        out.data[at + c] = edge ? 0.25 * mixed + 191.25 : mixed;
      }
      out.data[at + 3] = 255;
    }
  }
  context.putImageData(out, 0, 0);
  const counts = new Float64Array(classes.length + 1);
  for (const value of label) counts[value + 1] += 1 / label.length;
  shown.current = label;
  legend.querySelectorAll("li").forEach((line) => {
    const index = Number(line.dataset.index);
    const share = counts[index < classes.length ? index + 1 : 0];
    line.querySelector(".ldvc-share").textContent = percent(share);
    line.querySelector("i").style.width = `${100 * share}%`;
    line.classList.toggle("ldvc-absent", share === 0);
    const pressed = index === classes.findIndex((each) => each.name === alone);
    line.querySelector("button")?.setAttribute("aria-pressed", pressed);
    line.hidden = index === classes.length && !background.checked;
  });
  const spoken = classes.map((each, index) => [each.name, counts[index + 1]]).sort((a, b) => b[1] - a[1]).slice(0, 8);
  const shares = spoken.map(([name, share]) => `${name} ${percent(share)}`).join(", ");
  canvas.setAttribute("aria-label", `The photo painted by class: ${shares}`);
  threshold.parentElement.hidden = !background.checked;
  find("output").textContent = Number(threshold.value).toFixed(2);
  element.dataset.drawn = `${answer}`;
};

const soon = () => requestAnimationFrame(draw);
// The slider has steps; at the step of the checkpoint's own threshold it means exactly that one.
const wanted = () => {
  if (!background.checked) return null;
  const value = Number(threshold.value);
  return shown && Math.abs(value - shown.own_threshold) < 0.005 ? shown.own_threshold : value;
};
figure.said = () => ({ opacity: opacity.value / 100, outline: outline.checked, alone, background: wanted() });
const look = () => trigger("look");
const press = (name) => {
  alone = alone === name ? null : name;
  hovered = null;
  draw();
  look();
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
  const name = part("span", "ldvc-name", entry.title);
  name.title = entry.title;
  if (entry.seen === null) part("span", "");
  else part("span", `ldvc-tag ldvc-${entry.seen ? "seen" : "unseen"}`, entry.seen ? "seen" : "unseen");
  part("span", "ldvc-bar").appendChild(document.createElement("i"));
  part("span", "ldvc-share");
  row.style.setProperty("--c", entry.colour);
  if (entry.seen !== null) {
    row.type = "button";
    row.addEventListener("click", () => press(entry.name));
    row.addEventListener("pointerenter", (event) => { if (event.pointerType === "mouse") { hovered = index; soon(); } });
    row.addEventListener("pointerleave", () => { if (hovered !== null) { hovered = null; soon(); } });
  }
  item.appendChild(row);
  return item;
};

const take = async () => {
  const next = props.value;
  figure.hidden = !next;
  if (!next || !next.classes) return;
  const mine = ++answer;
  const [colours, marks, scores] = await Promise.all(
    [next.photo, next.labels, next.scores].map((uri) => pixels(uri, next.width, next.height)));
  if (mine !== answer) return;
  photo = colours;
  sent = channel(marks);
  best = channel(scores);
  grey = new Float32Array(sent.length);
  next.best_labels = new Uint8Array(sent.length);
  for (let i = 0; i < sent.length; i++) {
    grey[i] = 0.299 * photo[4 * i] + 0.587 * photo[4 * i + 1] + 0.114 * photo[4 * i + 2];
    next.best_labels[i] = marks[4 * i + 1];
  }
  const asked = next.classes.map((each) => each.title).join("\n");
  const same = shown && asked === shown.classes.map((each) => each.title).join("\n");
  const own = shown?.own_threshold;
  shown = next;
  hovered = null;
  if (!next.classes.some((each) => each.name === alone)) alone = null;
  canvas.width = next.width;
  canvas.height = next.height;
  if (next.opacity !== null && !same) {
    opacity.value = 100 * next.opacity;
    outline.checked = next.outline;
  }
  if (wish && (next.threshold === wish.value || performance.now() > wish.until)) wish = null;
  if (!wish) { // an answer that crossed a wish on its way does not undo it: the one to the wish follows
    background.checked = next.threshold !== null;
    if (next.threshold !== null) threshold.value = next.threshold;
    else if (next.own_threshold !== own) threshold.value = next.own_threshold; // of another model
  }
  const none = { name: "", title: next.none, seen: null, colour: next.none_colour };
  const lines = [...next.classes, none].map(line);
  if (next.classes.length > MANY) { // of a long list, what is in the photo comes first
    const counts = new Uint32Array(next.classes.length + 1);
    for (const mark of sent) counts[mark] += 1;
    lines.sort((a, b) => (counts[Number(b.dataset.index) + 1] ?? -1) - (counts[Number(a.dataset.index) + 1] ?? -1));
  }
  legend.replaceChildren(...lines);
  find(".ldvc-footnote").textContent = next.note;
  draw();
};

opacity.addEventListener("input", soon);
outline.addEventListener("input", soon);
background.addEventListener("input", soon);
threshold.addEventListener("input", soon);
for (const control of [opacity, outline]) control.addEventListener("change", look);
const rethreshold = () => {
  wish = { value: wanted(), until: performance.now() + WISH_LASTS };
  trigger("threshold");
};
for (const control of [background, threshold]) control.addEventListener("change", rethreshold);

const under = (event) => {
  const box = canvas.getBoundingClientRect();
  const x = Math.floor(((event.clientX - box.left) / box.width) * canvas.width);
  const y = Math.floor(((event.clientY - box.top) / box.height) * canvas.height);
  const inside = x >= 0 && y >= 0 && x < canvas.width && y < canvas.height;
  return shown?.current && inside ? y * canvas.width + x : null;
};
canvas.addEventListener("pointermove", (event) => {
  const at = under(event);
  tip.hidden = at === null;
  if (at === null) return;
  const label = shown.current[at];
  tip.textContent = `${label < 0 ? shown.none : shown.classes[label].title} · ${(best[at] / 255).toFixed(2)}`;
  const box = canvas.parentElement.getBoundingClientRect();
  tip.style.left = `${Math.min(event.clientX - box.left + 14, box.width - tip.offsetWidth - 4)}px`;
  tip.style.top = `${Math.max(event.clientY - box.top - 34, 4)}px`;
});
canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
canvas.addEventListener("click", (event) => {
  const at = under(event);
  if (at !== null && shown.current[at] >= 0) press(shown.classes[shown.current[at]].name);
});
document.addEventListener("keydown", (event) => {
  const open = element.isConnected && element.offsetParent !== null; // not behind another tab
  if (event.key === "Escape" && alone !== null && open) press(alone);
});

opacity.value = 55;
outline.checked = true;
watch("value", take);
take();
