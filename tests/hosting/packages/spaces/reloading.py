"""Gradio starts this on every Space, for the developer's mode of the Hub."""


def start_reload_server(prerun, postrun, stop_event) -> None:
    """Nothing is reloaded here."""
    stop_event.wait()
