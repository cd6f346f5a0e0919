"""A server with OpenAI's endpoints: completions, chat, metrics and a page to chat on."""

from dsv3_jax.serve.options import ServeOptions
from dsv3_jax.serve.server import require_servable, serve

__all__ = ["ServeOptions", "require_servable", "serve"]
