"""How much of the machine a run uses: model FLOPs utilisation."""

from __future__ import annotations

from dsv3_jax.config import Config
from dsv3_jax.model.flops import flops_per_token
from dsv3_jax.parallel.devices import peak_flops


def model_flops(config: Config, tokens_per_second: float) -> float:
    """Model FLOP/s of a run, over all devices: tokens a second times `flops_per_token`'s causal count.

    It counts what the model asks for, not what the machine does: attention to the tokens before, the backward as twice the
    forward, MTP depths included, and nothing of what is computed again for want of memory. Where attention is kept within
    documents, it is still counted over the whole sequence.
    """
    return tokens_per_second * flops_per_token(config.model, config.train.sequence_length).causal


def mfu(config: Config, tokens_per_second: float, num_devices: int, device_kind: str) -> float | None:
    """Model FLOPs utilisation: the share of the devices' peak that the model's arithmetic takes.

      tokens_per_second * flops_per_token / (num_devices * peak)

    The FLOPs are those of `model_flops`: causal, nothing recomputed; the peak is that of dense bfloat16, whatever the run
    computes in.

    Args:
      config: the run.
      tokens_per_second: of the whole run.
      num_devices: devices of the mesh, as JAX counts them.
      device_kind: JAX's name for one of them.

    Returns:
      A share of 1, or None if the device's peak is not known here, as that of a CPU.
    """
    peak = peak_flops(device_kind)
    return None if peak is None else model_flops(config, tokens_per_second) / (num_devices * peak)


def speed(config: Config, tokens_per_second: float, num_devices: int, device_kind: str) -> dict[str, float]:
    """What a logged row says of speed: `tokens_per_second`, and `mfu` where it is known, else `model_flops_per_second`."""
    share = mfu(config, tokens_per_second, num_devices, device_kind)
    of_machine = {"model_flops_per_second": model_flops(config, tokens_per_second)} if share is None else {"mfu": share}
    return {"tokens_per_second": tokens_per_second, **of_machine}
