"""A server with OpenAI's endpoints: completions, chat, metrics and a page to chat on."""

from dsv3_jax.serve.app import require_servable, serve
from dsv3_jax.serve.cli import ServeOptions

__all__ = ["ServeOptions", "require_servable", "serve"]
