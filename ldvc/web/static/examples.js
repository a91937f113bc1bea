// A click chooses the example with the index `props.value`. Of several quick clicks only the last one is sent, because the answers
// to several events may arrive in any order.
let timer;
element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  props.value = Number(button.dataset.index);
  clearTimeout(timer);
  timer = setTimeout(() => trigger("choose"));
});
