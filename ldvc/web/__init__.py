"""The Gradio page: inputs, tabs, endpoints."""
