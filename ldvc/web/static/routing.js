// A click or a key chooses a patch: `props.value` is its [row, column]. The server answers with the HTML for this patch.
// The element of the photo stays when its content is drawn again, so it keeps the focus.
const stage = () => element.querySelector(".ldvc-stage");
const choose = (row, column) => {
  const { rows, columns } = stage().dataset;
  props.value = [Math.min(Math.max(row, 0), rows - 1), Math.min(Math.max(column, 0), columns - 1)];
  trigger("input");
};
element.addEventListener("click", (event) => {
  if (!stage()?.contains(event.target)) return;
  const box = stage().getBoundingClientRect();
  const { height, width } = stage().dataset;
  choose(Math.floor(((event.clientY - box.top) / box.height) * height),
    Math.floor(((event.clientX - box.left) / box.width) * width));
});
element.addEventListener("keydown", (event) => {
  if (event.target !== stage()) return;
  const { row: shownRow, column: shownColumn, step, columns } = stage().dataset;
  const [row, column] = props.value ?? [Number(shownRow), Number(shownColumn)];
  const [down, along] = event.shiftKey ? step.split(",").map(Number) : [1, 1];
  const goals = {
    ArrowUp: [row - down, column], ArrowDown: [row + down, column], ArrowLeft: [row, column - along],
    ArrowRight: [row, column + along], Home: [row, 0], End: [row, columns - 1],
  };
  if (!(event.key in goals)) return;
  event.preventDefault();
  choose(...goals[event.key]);
});
