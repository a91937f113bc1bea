"""The endpoints as tools of the Model Context Protocol (MCP), for agents.

Gradio makes a tool of each named endpoint. The docstring describes the tool; its section "Args" has one line per argument.
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
    """Whether the server offers the tools, that is, whether the environment variable GRADIO_MCP_SERVER is "true".

    Raises:
        LdvcError: the package mcp is not installed.
    """
    wanted = os.environ.get(VARIABLE, "").lower() == "true"
    if wanted and find_spec("mcp") is None:
        raise LdvcError(f'{VARIABLE} needs the package mcp: install it with pip install -e ".[mcp]", or remove the variable.')
    return wanted


class Server(gradio.mcp.GradioMCPServer):
    """Gradio's MCP server with two changes: data is JSON, and clients that ask for no progress get every output, too."""

    async def _execute_tool_without_progress(self, job: Any) -> list[Any]:
        result = await run_sync(job.result)
        return list(result) if isinstance(result, list | tuple) else [result]  # Gradio 6.31 treats several outputs as one

    def postprocess_output_data(self, data: list[Any], root_url: str) -> list[Any]:
        """The content for the client: pictures, addresses of files, and text."""
        data = [json.dumps(each) if isinstance(each, dict) and not is_file_obj_with_meta(each) else each for each in data]
        return super().postprocess_output_data(data, root_url)

    def warn_about_state_inputs(self) -> None:
        """Do not warn: an endpoint only keeps the last photo in the session, so that it is encoded once."""


gradio.mcp.GradioMCPServer = Server  # `Blocks.launch` makes an object of this class
