"""The method: frozen CLIP towers with prompts, text adapter, attention, decoders, and the model that joins them."""
