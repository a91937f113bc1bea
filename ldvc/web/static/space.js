// The slider sets one CSS variable that moves all points. The element that holds it stays when its content is drawn again.
const show = (t) => element.style.setProperty("--t", t);
element.addEventListener("input", (event) => { if (event.target.type === "range") show(event.target.value / 100); });
element.addEventListener("click", (event) => {
  if (!event.target.classList.contains("ldvc-play")) return;
  const slider = element.querySelector("input[type=range]");
  const set = (t) => { show(t); slider.value = Math.round(100 * t); };
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) { set(slider.value > 50 ? 0 : 1); return; }
  let start = null;
  const frame = (now) => {
    start = start ?? now;
    const t = Math.min((now - start - 300) / 1500, 1);
    set(t < 0 ? 0 : t * t * (3 - 2 * t));
    if (t < 1) requestAnimationFrame(frame);
  };
  requestAnimationFrame(frame);
});
