"""Serve the page: python app.py

Environment variables:
    LDVC_MODEL           checkpoint folder or Hub id instead of the bundled "lite"; "full" opens the page with the full model
    LDVC_FULL            decoder checkpoint (folder or Hub id) for the full model; default: CLIP without a decoder
    LDVC_CLIP_WEIGHTS    file with the weights of the full CLIP; default: a download
    LDVC_ANSWERS_GB      memory for the answers of all visitors in GB (1.5); the oldest answers are removed
    GRADIO_TEMP_DIR      folder for uploaded photos and downloads; default: a new folder that is removed at the end
    GRADIO_SERVER_PORT   port (7860, or the next free port); GRADIO_SERVER_NAME: address (127.0.0.1)
    GRADIO_MCP_SERVER    "true" makes the endpoints tools of the Model Context Protocol (needs the extra "mcp")
"""

import logging
import os
import sys
import threading

# Gradio reads these settings at import: no telemetry, no search for newer versions, the folder for files.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from ldvc.web import temporary

os.environ[temporary.VARIABLE] = temporary.choose_folder()

from ldvc.web.gpu import gpu_is_lent  # before anything that imports torch

# isort: split
from ldvc.errors import LdvcError
from ldvc.web.examples import answer_examples, answer_opening
from ldvc.web.models import LITE, ModelRegistry
from ldvc.web.page import answers_limit, build_page, launch_options


def main() -> None:
    """Load the model, build the page, serve it."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for noisy in ("httpx", "fontTools"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        temporary.check_folder()
        answers_limit()
        options = launch_options()
    except LdvcError as error:
        sys.exit(str(error))
    try:
        registry = ModelRegistry.from_environment()
    except LdvcError as error:
        sys.exit(f"The model could not be loaded. {error}")
    if gpu_is_lent():
        registry.warm()
    page = build_page(registry)
    if registry.default == LITE:  # takes a second; then the page opens with an answer, also for the first visitor
        answer_opening(page.segmenter)

    def prepare() -> None:
        """Load all decoders and answer the examples, so that no visitor waits for them."""
        if not gpu_is_lent():
            registry.warm()
        answer_examples(page.segmenter)

    threading.Thread(target=prepare, daemon=True).start()
    page.launch(**options)


if __name__ == "__main__":
    main()
