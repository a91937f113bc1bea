// The button of a chip removes its name. The server removes the name from the list; until then, `props.value` lists the removed
// names and their chips are hidden, so that a visitor can press several buttons before the first answer. Quick clicks are sent
// together: with one event for each click, a late answer would restore names.
let timer;
const buttons = () => [...element.querySelectorAll("button[data-name]")];
const update = (removed) => {
  props.value = removed;
  for (const button of buttons()) button.closest("li").hidden = removed.includes(button.dataset.name);
};
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-name]");
  if (!button) return;
  update([...props.value, button.dataset.name]);
  clearTimeout(timer);
  timer = setTimeout(() => trigger("remove"));
});
// Gradio takes a quoted word in this script for the name of an event, so the prop has its name without quotes.
watch(Object.keys({ chips: 0 }), () => {
  update(props.value.filter((name) => buttons().some((button) => button.dataset.name === name)));
});
