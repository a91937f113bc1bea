// gr.ImageSlider cannot be moved with the keyboard; a range input can. The position is kept on the element, which stays.
element.addEventListener("input", (event) => {
  if (event.target.type === "range") element.style.setProperty("--at", `${event.target.value}%`);
});
