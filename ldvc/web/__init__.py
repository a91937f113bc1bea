"""The Gradio page: layout, handlers, texts."""
