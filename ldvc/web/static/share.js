// Copies the address that opens this answer. Browsers may forbid this, for example on a page without encryption.
element.addEventListener("click", async (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  const message = element.querySelector("[role=status]");
  const address = new URL(button.dataset.link, location.href).href;
  try {
    await navigator.clipboard.writeText(address);
    message.textContent = message.dataset.copied;
  } catch {
    history.replaceState(null, "", address);
    message.textContent = message.dataset.blocked;
  }
});
