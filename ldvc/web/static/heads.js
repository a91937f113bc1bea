// A click on a small map chooses its layer and head: `props.value` is [layer, head], where head -1 is the mean.
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-layer]");
  if (!button) return;
  props.value = [Number(button.dataset.layer), Number(button.dataset.head)];
  trigger("input");
});
