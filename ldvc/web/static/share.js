// Copies the address that opens this answer. Browsers may forbid it, as on a page without encryption.
element.addEventListener("click", async (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  const said = element.querySelector("[role=status]");
  const address = new URL(button.dataset.link, location.href).href;
  try {
    await navigator.clipboard.writeText(address);
    said.textContent = said.dataset.copied;
  } catch {
    history.replaceState(null, "", address);
    said.textContent = said.dataset.blocked;
  }
});
