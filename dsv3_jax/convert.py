"""`python -m dsv3_jax.convert SOURCE TARGET`: convert a run directory to a Hugging Face folder, or the other way round.

The direction follows from the source. transformers, and inference engines that follow its format, load the folder made of a
run; a published checkpoint becomes a run at step 0, to sample from or to train further.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from etils import epath

from dsv3_jax.checkpoint.hugging_face import check_no_folder, load_hf, named_dtype, new_folder, save_hf
from dsv3_jax.checkpoint.run import load_run
from dsv3_jax.config import Config, DataConfig, TrainConfig
from dsv3_jax.config.cli import OneLineParser, cli_main
from dsv3_jax.config.run import is_hugging_face
from dsv3_jax.data.chat_template import with_closing_tokens
from dsv3_jax.data.tokenizer import TOKENIZER, load_tokenizer
from dsv3_jax.files import tokenizer_files
from dsv3_jax.train.start import save_run_start


def run_to_hf(source: Any, target: Any, *, dtype: str | None = None, fp8: bool = False) -> None:
    """Write the newest undamaged checkpoint of the run `source` as the Hugging Face folder `target`; print a line.

    Args:
      source: a run directory.
      target: the folder to make.
      dtype: dtype of the tensors (router biases: float32); None keeps the run's.
      fp8: store linear layers as FP8 blocks of 128 x 128 with scales.

    Raises:
      ValueError: if `source` holds no undamaged checkpoint, or `target` exists and is not empty.
    """
    check_no_folder(target)
    config, variables, step = load_run(str(source), dtype)
    has_tokenizer = (epath.Path(source) / TOKENIZER).exists()
    tokenizer_from = source if tokenizer_files(epath.Path(source)) else None
    model = with_closing_tokens(config.model, source, load_tokenizer(source)) if has_tokenizer else config.model
    save_hf(target, model, variables, tokenizer_from=tokenizer_from, fp8=fp8)
    print(f"{source}, step {step}, is now the Hugging Face folder {target}{'' if has_tokenizer else ' (no tokenizer.json)'}")


def hf_to_run(source: Any, target: Any, *, dtype: str | None = None) -> None:
    """Write the Hugging Face folder `source` as the run directory `target`, at step 0, with its tokenizer; print a line.

    Args:
      source: a folder with config.json and safetensors.
      target: the run directory to make.
      dtype: dtype to compute in and to store; None stores float32 and computes in the dtype that config.json states.

    Raises:
      ValueError: if `source` cannot be loaded, or `target` exists and is not empty.
    """
    check_no_folder(target)
    model, variables = load_hf(source, dtype or "float32")
    if dtype is None:
        model = dataclasses.replace(model, dtype=named_dtype(source))
    tokenizer = epath.Path(source) / TOKENIZER
    has_tokenizer = tokenizer.exists()
    config = Config(
        model=model,
        data=DataConfig(tokenizer=str(epath.Path(target) / TOKENIZER) if has_tokenizer else None),
        train=TrainConfig(sequence_length=min(TrainConfig.sequence_length, model.max_position_embeddings)),
    )
    # All or nothing: a run without its checkpoint would continue from random weights.
    with new_folder(epath.Path(target), processes=1) as folder:
        save_run_start(str(folder), config, variables)
        for file in tokenizer_files(epath.Path(source)):
            file.copy(folder / file.name)
    print(f"{source} is now the run directory {target}, at step 0{'' if has_tokenizer else ' (no tokenizer.json)'}")


@cli_main
def main(arguments: Sequence[str] | None = None) -> None:
    """Convert SOURCE to TARGET: a Hugging Face folder becomes a run directory, a run becomes a Hugging Face folder."""
    parser = OneLineParser(prog="python -m dsv3_jax.convert", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("source", help="a run directory or a Hugging Face folder")
    parser.add_argument("target", help="the folder to make; it must not exist, or be empty")
    dtypes = "float32", "bfloat16", "float16"
    parser.add_argument(
        "--dtype", choices=dtypes, help="dtype of the parameters written; by default a run's own, and float32 for a new run"
    )
    parser.add_argument("--fp8", action="store_true", help="to Hugging Face only: linear layers as FP8 blocks")
    parsed = parser.parse_args(arguments)
    if not is_hugging_face(parsed.source):
        run_to_hf(parsed.source, parsed.target, dtype=parsed.dtype, fp8=parsed.fp8)
    elif parsed.fp8:
        raise ValueError(f"--fp8 is for writing Hugging Face folders, and {parsed.source} is one already; leave --fp8 out")
    else:
        hf_to_run(parsed.source, parsed.target, dtype=parsed.dtype)


if __name__ == "__main__":
    main()
