"""docs/what_loads.md against the published config.json files in tests/fixtures/published_configs.json."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dsv3_jax import ModelConfig
from dsv3_jax.checkpoint.fp8 import block_size

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIGS = json.loads((ROOT / "tests" / "fixtures" / "published_configs.json").read_text(encoding="utf-8"))
ROWS = {
    cells[0]: cells[1:]
    for line in (ROOT / "docs" / "what_loads.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and "/" in (cells := [cell.strip() for cell in line.strip("|").split("|")])[0]
}
OTHER_FORMATS = {"nvidia/DeepSeek-V3.1-NVFP4": "NVFP4", "moonshotai/Kimi-K2-Thinking": "int4"}
"""Checkpoints whose weights are packed in a way that these config.json files do not mention."""


def test_every_row_has_a_config_or_says_that_it_is_not_checked() -> None:
    checked = {name for name, (_, _, config, _) in ROWS.items() if config != "not checked"}
    assert checked == set(CONFIGS)
    assert all(weights in ("yes", "no") and text in ("yes", "no") for weights, text, *_ in ROWS.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_row(name: str) -> None:
    weights, text, _, remark = ROWS[name]
    published = CONFIGS[name]
    if weights == "yes" or name in OTHER_FORMATS:
        config = ModelConfig.from_hf(published)
        assert config.num_hidden_layers == published["num_hidden_layers"]
        assert block_size(published) == ((128, 128) if "quantization_config" in published else None)
        assert (weights == "no") == (name in OTHER_FORMATS)
        assert OTHER_FORMATS.get(name, "") in remark
    else:
        model_type = published["model_type"]
        with pytest.raises(ValueError, match=re.escape(repr(model_type))):
            ModelConfig.from_hf(published)
        assert f"`model_type: {model_type}`" in remark
    if name.startswith("moonshotai/") and weights == "yes":
        assert text == "no"
        assert "tiktoken.model" in remark
