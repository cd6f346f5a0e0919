"""YaRN's numbers, as the `rope_scaling` of a Hugging Face config names them."""

from __future__ import annotations

import dataclasses
import math

from dsv3_jax.config.checks import require, require_numbers, require_positive


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """YaRN context extension (arXiv 2309.00071; section 4.3 of the report). Static: it applies at every length."""

    factor: float = 40.0
    """By how much the context is stretched."""
    original_max_position_embeddings: int = 4096
    """Context length before stretching."""
    beta_fast: float = 32.0
    """Dimensions that turn more often than this within the original context are left alone."""
    beta_slow: float = 1.0
    """Dimensions that turn less often than this are interpolated in full."""
    mscale: float | None = 1.0
    """Scales cos and sin, relative to mscale_all_dim; None if the checkpoint does not name it."""
    mscale_all_dim: float | None = 1.0
    """Scales the attention logits (squared); 0 or None leaves them alone."""

    def __post_init__(self) -> None:
        require_numbers(self, "rope_scaling.")
        require(self.factor >= 1.0, f"rope_scaling.factor is {self.factor}; it must be at least 1")
        require_positive(self, "original_max_position_embeddings")
        require(
            self.beta_fast >= self.beta_slow > 0,
            f"rope_scaling.beta_fast ({self.beta_fast}) must be at least beta_slow ({self.beta_slow}), which must be positive",
        )

    def attention_scale(self, mscale: float | None) -> float:
        """0.1 * mscale * ln(factor) + 1: the temperature correction of YaRN, eq. 22."""
        return 0.1 * (1.0 if mscale is None else mscale) * math.log(self.factor) + 1.0
