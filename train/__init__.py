"""Training and evaluation; nothing in `ldvc` imports it."""
