"""HTTP server with OpenAI's endpoints for completions and chats, metrics, and a chat page."""

from dsv3_jax.serve.app import check_servable, serve
from dsv3_jax.serve.cli import ServeOptions

__all__ = ["ServeOptions", "check_servable", "serve"]
