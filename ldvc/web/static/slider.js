// gr.ImageSlider cannot be moved with the keyboard; a range input can. The element stays when its content is drawn again, so it holds the position.
element.addEventListener("input", (event) => {
  if (event.target.type === "range") element.style.setProperty("--at", `${event.target.value}%`);
});
