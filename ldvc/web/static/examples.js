// A click chooses the example with the index `props.value`. If two clicks are faster than Gradio, it may send the first index twice
// or show the two answers in reverse order. `props.chosen` begins with the index of the last answer: if it is another one than the
// wanted one, the script asks again.
let wanted = null;
const choose = (index) => {
  wanted = props.value = index;
  trigger("choose");
};
element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) choose(Number(button.dataset.index));
});
// Gradio takes a quoted word in this script for the name of an event, so the prop has its name without quotes.
watch(Object.keys({ chosen: 0 }), () => {
  const [index] = props.chosen;
  element.dataset.chosen = index;
  if (wanted !== null && index !== wanted) choose(wanted);
});
