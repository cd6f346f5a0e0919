"""The rule by which implementations are chosen, on an invented choice and on the three there are."""

from __future__ import annotations

import typing
from collections.abc import Callable

import jax
import pytest

from dsv3_jax.config.model import AttentionBackend, CacheBackend, ExpertBackend
from dsv3_jax.kernels.attention import choose_attention
from dsv3_jax.kernels.backend import Backends
from dsv3_jax.kernels.experts import choose_backend
from dsv3_jax.kernels.gpu import hopper
from dsv3_jax.kernels.latent_attention import choose_latent_backend

CHOICE = Backends("engine", auto={"cpu": "steam", "tpu": "warp"}, anywhere=("steam", "sail"), only_on={"warp": "tpu"})


@pytest.mark.parametrize(
    ("name", "platform", "chosen"),
    [
        ("auto", "cpu", "steam"),
        ("auto", "tpu", "warp"),
        ("warp", "tpu", "warp"),
        ("sail", "tpu", "sail"),
        ("sail", "abacus", "sail"),
    ],
)
def test_a_name_stands_for_itself_and_auto_for_what_suits(name: str, platform: str, chosen: str) -> None:
    assert CHOICE.resolve_backend(name, platform) == chosen


def test_the_platform_is_that_of_jax_unless_named() -> None:
    assert jax.default_backend() == "cpu"
    assert CHOICE.resolve_backend("auto", None) == "steam"
    with pytest.raises(ValueError, match="this program is for cpu"):
        CHOICE.resolve_backend("warp", None)


def test_auto_passes_over_what_this_machine_refuses_and_a_name_does_not() -> None:
    reasons = {"warp": lambda: "takes dilithium, and there is none"}
    assert CHOICE.resolve_backend("auto", "tpu", reasons) == "steam"
    assert CHOICE.resolve_backend("auto", "tpu", {"warp": lambda: None}) == "warp"
    assert CHOICE.resolve_backend("sail", "tpu", reasons) == "sail"
    with pytest.raises(ValueError, match="it takes dilithium, and there is none; use 'auto' or 'steam' or 'sail'"):
        CHOICE.resolve_backend("warp", "tpu", reasons)


@pytest.mark.parametrize(
    ("name", "platform", "error", "message"),
    [
        (
            "warp",
            "gpu",
            ValueError,
            "engine 'warp' runs on tpu only, and this program is for gpu; use 'auto' or 'steam' or 'sail'",
        ),
        ("auto", "abacus", ValueError, "engine 'auto' has no choice on platform 'abacus'; use steam or sail"),
        ("stem", "cpu", ValueError, "engine is 'stem'; choose one of auto, warp, steam, sail"),
    ],
)
def test_what_cannot_be_is_refused_by_name(name: str, platform: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CHOICE.resolve_backend(name, platform)


@pytest.mark.parametrize(
    ("choose", "kind", "autos"),
    [
        (lambda name, on: choose_backend(name, "bfloat16", on), ExpertBackend, ["tiles", "tiles", "pallas_tpu"]),
        (
            lambda name, on: choose_attention(name, "bfloat16", (192, 128), on),
            AttentionBackend,
            ["chunked", "chunked", "splash"],
        ),
        (
            lambda name, on: choose_latent_backend(name, "bfloat16", (512, 64), on),
            CacheBackend,
            ["chunked", "chunked", "pallas_tpu"],
        ),
    ],
    ids=["experts", "attention", "cache"],
)
def test_the_three(choose: Callable[[str, str], str], kind: typing.Any, autos: list[str]) -> None:
    """Every name that a config can hold can be chosen somewhere; a GPU that is no Hopper has what runs everywhere."""
    assert [choose("auto", platform) for platform in ("cpu", "gpu", "tpu")] == autos
    names = [name for name in typing.get_args(kind) if name not in ("auto", "pallas_gpu")]
    assert [choose(name, "tpu") for name in names] == names


@pytest.mark.parametrize(
    ("kind", "dtype", "narrow", "chosen"),
    [
        ("NVIDIA H200", "bfloat16", False, "pallas_gpu"),
        ("NVIDIA H200", "bfloat16", True, "chunked"),
        ("NVIDIA H200", "float32", False, "chunked"),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", False, "chunked"),
    ],
)
def test_attention_on_a_gpu(kind: str, dtype: str, narrow: bool, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By kernels where these can run; by name elsewhere, they are refused with the reason."""
    monkeypatch.setattr(hopper, "current_gpu", lambda: hopper.GPU(kind, 132))
    for choose, widths in ((choose_attention, (192, 128)), (choose_latent_backend, (512, 64))):
        widths = (24, 16) if narrow else widths
        assert choose("auto", dtype, widths, "gpu") == chosen
        if chosen != "pallas_gpu":
            with pytest.raises(ValueError, match=r"pallas_gpu.*(takes|multiplies|is written for) .*; use 'auto' or 'chunked'"):
                choose("pallas_gpu", dtype, widths, "gpu")
