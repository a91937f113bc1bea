"""The page: python app.py

Environment variables:
    LDVC_MODEL           checkpoint folder or Hub id instead of the bundled "lite"; "full" opens the page with that choice
    LDVC_FULL            decoder checkpoint (folder or Hub id) for the choice "full"
    GRADIO_SERVER_PORT   port (7860, or the next free one), GRADIO_SERVER_NAME address (127.0.0.1)
"""

import logging
import os
import sys
import threading

# Before Gradio is imported: no telemetry, no search for newer versions.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from ldvc.web.gpu import gpu_is_lent  # before anything that imports torch

# isort: split
from ldvc.errors import LdvcError
from ldvc.web.models import ModelRegistry
from ldvc.web.page import build_page, launch_options


def main() -> None:
    """Load the model, build the page, serve it."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        registry = ModelRegistry.from_environment()
    except LdvcError as error:
        sys.exit(f"The model could not be loaded. {error}")
    if gpu_is_lent():
        registry.warm()
    else:
        threading.Thread(target=registry.warm, daemon=True).start()
    build_page(registry).launch(**launch_options())


if __name__ == "__main__":
    main()
