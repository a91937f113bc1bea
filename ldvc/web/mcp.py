"""The endpoints as tools of the Model Context Protocol (MCP), for agents.

Gradio makes a tool of each named endpoint: the docstring describes it, its section "Args" the arguments, one line for each.
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from typing import Any

import gradio.mcp
from anyio.to_thread import run_sync
from gradio_client.utils import is_file_obj_with_meta

from ldvc.errors import LdvcError

VARIABLE = "GRADIO_MCP_SERVER"


def is_wanted() -> bool:
    """Whether the server offers the tools: the environment variable GRADIO_MCP_SERVER is "true".

    Raises:
        LdvcError: the package for it is not installed.
    """
    wanted = os.environ.get(VARIABLE, "").lower() == "true"
    if wanted and find_spec("mcp") is None:
        raise LdvcError(f'{VARIABLE} needs the package mcp: install it with pip install -e ".[mcp]", or remove the variable.')
    return wanted


class Server(gradio.mcp.GradioMCPServer):
    """Gradio's server of the tools, which answers in JSON, and with every output also to clients that ask for no progress."""

    async def _execute_tool_without_progress(self, job: Any) -> list[Any]:
        result = await run_sync(job.result)
        return list(result) if isinstance(result, list | tuple) else [result]  # Gradio 6.31 takes several outputs for one

    def postprocess_output_data(self, data: list[Any], root_url: str) -> list[Any]:
        """What the client gets: pictures, addresses of files, and text."""
        data = [json.dumps(each) if isinstance(each, dict) and not is_file_obj_with_meta(each) else each for each in data]
        return super().postprocess_output_data(data, root_url)

    def warn_about_state_inputs(self) -> None:
        """Without a warning: all that an endpoint keeps in the session is the last photo, so that it is encoded once."""


gradio.mcp.GradioMCPServer = Server  # `Blocks.launch` makes an object of this class
