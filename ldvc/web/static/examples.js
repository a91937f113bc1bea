// A click chooses the example with the index `props.value`. Of several clicks in one moment the last one is sent: Gradio would send
// all of them, and their answers may come in any order.
let timer;
element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  props.value = Number(button.dataset.index);
  clearTimeout(timer);
  timer = setTimeout(() => trigger("choose"));
});
