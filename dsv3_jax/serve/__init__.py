"""A server with OpenAI's endpoints: completions, chat, metrics and a page to chat on."""

from dsv3_jax.serve.app import check_servable, serve
from dsv3_jax.serve.cli import ServeOptions

__all__ = ["ServeOptions", "check_servable", "serve"]
