// The painted photo. It is composited here, so that opacity, outlines, the threshold and a class alone need no server.
// Draws as `ldvc.visualize.overlay` does; change both or none. Names only ever become text (`textContent`).
// `props.answer` is what the server sent, `props.value` what the visitor set: opacity, outline, alone (a name or null), and
// background (the threshold of "none of these", "default" = the model's own, null = not allowed).
const find = (selector) => element.querySelector(selector);
const [figure, canvas, tip, legend] = [".ldvc-viewer", "canvas", ".ldvc-tip", ".ldvc-legend"].map(find);
const [opacity, outline, background, threshold] = [".opacity", ".outline", ".background", ".threshold"].map(find);
const context = canvas.getContext("2d", { willReadFrequently: true });
const NONE = -1;
const MANY = 12; // classes from which on the legend is sorted by area
const DEFAULT = "default";
let answer = null; // the answer that is painted; what is decoded from it:
let photo, grey, best, scores; // per pixel: RGBA, luminance, the best class, its score in 0..255
let label; // per pixel: the class that is painted, or NONE
let hovered = null; // class under the pointer in the legend
let count = 0; // of answers, so that an older one is dropped

const pixels = async (uri, width, height) => {
  const image = new Image();
  image.src = uri;
  await image.decode();
  const sheet = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  sheet.drawImage(image, 0, 0, width, height);
  return sheet.getImageData(0, 0, width, height).data;
};
// Class numbers are bytes, not a picture: some browsers change what is read from a canvas, against fingerprinting.
const unpack = async (packed) => {
  const compressed = Uint8Array.from(atob(packed), (each) => each.charCodeAt(0));
  const stream = new Blob([compressed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
};
const rgb = (colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
const percent = (share) => (share > 0 && share < 0.01 ? "<1\u202f%" : `${Math.round(share * 100)}\u202f%`);
const limit = () => {
  const wanted = props.value.background;
  return wanted === DEFAULT ? answer.own_threshold : wanted;
};
const aloneIndex = () => answer.classes.findIndex((each) => each.name === props.value.alone);

const paint = () => {
  const { width, height, classes } = answer;
  const only = hovered ?? aloneIndex();
  const view = only < 0 ? label : label.map((value) => (value === only ? only : NONE));
  const amount = props.value.opacity;
  const muted = 0.5 * Math.min(1, amount / answer.usual_opacity);
  const period = Math.max(8, Math.round(Math.max(width, height) / 60));
  const paints = classes.map((each) => rgb(each.colour));
  const out = context.createImageData(width, height);
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      const value = view[i];
      const at = 4 * i;
      const colour = value < 0 ? null : paints[value];
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
};

const draw = () => {
  if (!answer) return;
  const least = limit() === null ? NONE : limit() * 255;
  label = Int16Array.from(best, (value, i) => (scores[i] < least ? NONE : value));
  paint();
  const { classes } = answer;
  const shares = new Float64Array(classes.length + 1);
  for (const value of label) shares[value < 0 ? classes.length : value] += 1 / label.length;
  for (const line of legend.children) {
    const index = Number(line.dataset.index);
    line.querySelector(".ldvc-share").textContent = percent(shares[index]);
    line.querySelector("i").style.width = `${100 * shares[index]}%`;
    line.classList.toggle("ldvc-absent", shares[index] === 0);
    line.querySelector("button")?.setAttribute("aria-pressed", index === aloneIndex());
    line.hidden = index === classes.length && limit() === null;
  }
  const largest = classes.map((each, index) => [each.name, shares[index]]).sort((a, b) => b[1] - a[1]).slice(0, 8);
  const text = largest.map(([name, share]) => `${name} ${percent(share)}`).join(", ");
  canvas.setAttribute("aria-label", `The photo painted by class: ${text}`);
  threshold.parentElement.hidden = limit() === null;
  find("output").textContent = Number(threshold.value).toFixed(2);
  element.dataset.drawn = `${count}`;
};

const soon = () => requestAnimationFrame(draw);
const change = (settings) => {
  props.value = { ...props.value, ...settings };
  soon();
};
const press = (name) => {
  hovered = null;
  change({ alone: props.value.alone === name ? null : name });
};
const hover = (index) => {
  hovered = index;
  soon();
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

// The controls show the settings, which the server changes where they do not fit a new answer.
const showSettings = () => {
  opacity.value = 100 * props.value.opacity;
  outline.checked = props.value.outline;
  background.checked = props.value.background !== null;
  if (answer && limit() !== null) threshold.value = limit();
};

const take = async () => {
  const next = props.answer;
  const mine = ++count;
  figure.hidden = !next;
  if (!next) {
    answer = null;
    return;
  }
  const found = await Promise.all([pixels(next.photo, next.width, next.height), unpack(next.labels), unpack(next.scores)]);
  if (mine !== count) return;
  [answer, hovered, photo, best, scores] = [next, null, ...found];
  grey = Float32Array.from(best, (_, i) => 0.299 * photo[4 * i] + 0.587 * photo[4 * i + 1] + 0.114 * photo[4 * i + 2]);
  [canvas.width, canvas.height] = [next.width, next.height];
  const lines = [...next.classes, { title: next.none, seen: null, colour: next.none_colour }].map(line);
  if (next.classes.length > MANY) { // of a long list, what is in the photo comes first
    const counts = new Uint32Array(next.classes.length + 1);
    best.forEach((value, i) => { if (limit() === null || scores[i] >= limit() * 255) counts[value] += 1; });
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
for (const control of [background, threshold]) {
  control.addEventListener("input", () => {
    const value = Number(threshold.value);
    const isDefault = Math.abs(value - answer.own_threshold) < 0.005; // the slider has steps of 0.01
    change({ background: !background.checked ? null : isDefault ? DEFAULT : value });
  });
}

const under = (event) => {
  const box = canvas.getBoundingClientRect();
  const x = Math.floor(((event.clientX - box.left) / box.width) * canvas.width);
  const y = Math.floor(((event.clientY - box.top) / box.height) * canvas.height);
  const inside = x >= 0 && y >= 0 && x < canvas.width && y < canvas.height;
  return answer && inside ? y * canvas.width + x : null;
};
canvas.addEventListener("pointermove", (event) => {
  const at = under(event);
  tip.hidden = at === null;
  if (at === null) return;
  tip.textContent = `${label[at] < 0 ? answer.none : answer.classes[label[at]].title} · ${(scores[at] / 255).toFixed(2)}`;
  const box = canvas.parentElement.getBoundingClientRect();
  tip.style.left = `${Math.min(event.clientX - box.left + 14, box.width - tip.offsetWidth - 4)}px`;
  tip.style.top = `${Math.max(event.clientY - box.top - 34, 4)}px`;
});
canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
canvas.addEventListener("click", (event) => {
  const at = under(event);
  if (at !== null && label[at] >= 0) press(answer.classes[label[at]].name);
});
document.addEventListener("keydown", (event) => {
  const open = element.isConnected && element.offsetParent !== null; // not behind another tab
  if (event.key === "Escape" && answer && props.value.alone !== null && open) press(props.value.alone);
});

// Gradio takes a quoted word in this script for the name of an event, so the prop has its name without quotes.
watch(Object.keys({ answer }), take);
take();
