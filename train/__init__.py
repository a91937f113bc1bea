"""Training and evaluation; nothing in `ldvc` knows of it."""
