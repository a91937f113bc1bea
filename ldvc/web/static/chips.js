// The names in front of their chips' buttons are removed by the server; `props.value` lists the removed ones until their chips
// are gone, so that several buttons may be pressed before the first answer. Clicks in one moment are sent together: Gradio would
// send each of them, and an answer that comes late would bring names back.
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
