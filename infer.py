"""Complete a prompt, streaming the text; or chat; or complete a file of prompts; or serve an HTTP API.

    python infer.py --checkpoint runs/tiny --prompt "def main(" --max-tokens 64
    python infer.py --checkpoint path/to/hf_folder --prompt "..." --temperature 0.7 --top-p 0.95
    python infer.py --checkpoint path/to/hf_folder --interactive --mesh.expert 4 --mesh.tensor 2
    python infer.py --checkpoint runs/tiny --batch-file prompts.jsonl completions.jsonl
    python infer.py --checkpoint path/to/hf_folder --serve --port 8000

Several processes, such as on the hosts of a pod, are each started with the same command; process 0 reads, writes and serves.
The checkpoint is a run directory of train.py, or a Hugging Face folder with a tokenizer.json. Generated text goes to stdout
or the file, settings and speed to stderr.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from dsv3_jax import Engine, SamplingParams
from dsv3_jax.config.cli import cli_main, parse_flags
from dsv3_jax.config.run import read_model
from dsv3_jax.data.chat_template import ChatTemplate, find_chat_template, load_chat_template
from dsv3_jax.data.storage import digest
from dsv3_jax.data.tokenizer import load_tokenizer
from dsv3_jax.infer.batch import (
    CompletionLines,
    PromptLines,
    check_place,
    complete_lines,
    encode_lines,
    read_otherwise_before,
    read_prompt_lines,
    submit_lines,
)
from dsv3_jax.infer.cache import DEFAULT_MAX_LENGTH, EngineConfig
from dsv3_jax.infer.chat import Conversation, converse
from dsv3_jax.infer.load import LoadedModel, load_model
from dsv3_jax.infer.multihost import follower, leader
from dsv3_jax.infer.report import Speed, opening
from dsv3_jax.infer.request import check_id, prompt_ids, token_ids
from dsv3_jax.parallel.devices import cache_compilations
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.multihost import check_agreement, first_process_first, is_first_process, join_processes
from dsv3_jax.rebalance import read_placement
from dsv3_jax.serve import check_servable, serve
from dsv3_jax.serve.cli import Flags


class Task(NamedTuple):
    """Inputs of the program other than weights, checked; prompts and template only on process 0."""

    prompts: PromptLines | None
    template: ChatTemplate | None
    sizes: dict[str, Any]
    """Size arguments of `Engine`, by name."""
    model_name: str
    placement: dict[str, np.ndarray] | None
    """Stack -> expert in each slot, int32; None if every expert has one slot."""


@cli_main
def main() -> None:
    flags, speed = parse_flags(Flags, description=__doc__), Speed()
    join_processes(flags.distributed)
    check_agreement(dataclasses.asdict(flags) | {"distributed": None})
    mesh = make_mesh(flags.mesh)
    task = first_process_first(lambda: checked(flags, mesh))
    model = load_model(flags.checkpoint, flags.dtype, mesh)
    if flags.stop_token_ids:
        ends = tuple(dict.fromkeys([*model.config.eos_token_ids, *flags.stop_token_ids]))
        model = model._replace(config=dataclasses.replace(model.config, eos_token_id=ends))
    check_agreement(
        {"checkpoint": model.origin, "tokenizer": digest(model.tokenizer.to_json()), **dataclasses.asdict(model.config)}
    )
    cache_compilations(flags.cache_dir)
    params = flags.sampling(model.infer, longest=model.config.max_position_embeddings)
    prompt = model.infer.prompt if flags.prompt is None else flags.prompt
    ids = token_ids(prompt, model.config, model.tokenizer, plain=flags.plain_prompt) if flags.one_shot else []
    sizes = task.sizes
    if flags.one_shot and flags.max_length is None and flags.cache_tokens is None:
        sizes = sizes | {"max_length": length_for(ids, params, model)}
    options = {"mesh": mesh, "prefix_cache": flags.prefix_cache, "placement": task.placement, **sizes}
    engine = Engine(model.config, model.variables, model.tokenizer, donate=True, **options)
    if not is_first_process():
        follower(engine)
        return
    lines, code, failure = opening(model, mesh, engine), 0, None
    with leader(engine):
        if flags.serve:
            say(*lines)
            code = serve(engine, task.model_name, task.template, flags.server, flags.switches)
        elif flags.batch_file is not None:
            failed = batch(task, flags, params, model, engine, lines, speed)
            failure = f"{failed} lines ended with an error, which {flags.batch_file[1]} holds" if failed else None
        elif flags.interactive:
            assert task.template is not None
            say(*lines)
            converse(Conversation(engine, task.template, model.tokenizer, params, flags.switches), speed)
        else:
            updates = engine.stream_text(ids, params)
            say(*lines)
            print(prompt, end="", flush=True)
            for update in updates:
                print(update.text, end="", flush=True)
                speed.note(len(update.tokens))
                if update.request.error is not None:
                    failure = update.request.error
            print(flush=True)
    if flags.serve:
        sys.exit(code)
    say(speed.summary(engine))
    if failure is not None:
        raise ValueError(failure)


def checked(flags: Flags, mesh: Mesh) -> Task:
    """Read and check all inputs except the weights, which take minutes to read. Raises ValueError for errors in them.

    Only process 0 reads prompts and template, and checks the output file and the options of the server.
    """
    config, tokenizer = read_model(flags.checkpoint), load_tokenizer(flags.checkpoint)
    name, sizes = flags.served_model_name or model_name(flags.checkpoint), flags.sizes(config)
    for i in flags.stop_token_ids:
        check_id(i, config)
    longest = EngineConfig.of(config, mesh, **sizes).max_length
    placement = None if flags.placement is None else read_placement(flags.placement, config, mesh.shape["expert"])
    if not is_first_process():
        return Task(None, None, sizes, name, placement)
    prompts = None
    if flags.batch_file is not None:
        prompts = read_prompt_lines(flags.batch_file[0])
        check_place(flags.batch_file[1], prompts=flags.batch_file[0])
    is_chat = flags.interactive or (prompts is not None and prompts.need_template)
    template = (load_chat_template if is_chat else find_chat_template)(flags.checkpoint)
    if flags.prompt is not None:
        if flags.max_length is None and flags.cache_tokens is None:  # The engine is then sized for this prompt.
            longest = config.max_position_embeddings
        prompt_ids(flags.prompt, config, tokenizer, longest, plain=flags.plain_prompt)
    if flags.serve:
        check_servable(name, flags.server)
    return Task(prompts, template, sizes, name, placement)


def model_name(checkpoint: str) -> str:
    """Return the name of a checkpoint's folder; of a snapshot in Hugging Face's cache the repository's, as owner/name."""
    path = Path(checkpoint).absolute()
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return path.name


def batch(
    task: Task,
    flags: Flags,
    params: SamplingParams,
    model: LoadedModel,
    engine: Engine,
    lines: list[str],
    speed: Speed,
) -> int:
    """Complete the prompts that the output file lacks, and append them to it; return the number that ended with an error."""
    assert task.prompts is not None
    assert flags.batch_file is not None
    path = flags.batch_file[1]
    form = model.config, task.template, model.tokenizer
    ids = encode_lines(task.prompts.lines, *form, switches=flags.switches, plain=flags.plain_prompt)
    otherwise = read_otherwise_before(task.prompts.lines, ids, model.config, model.tokenizer)
    depends_on = {
        "prompts": task.prompts.digest,
        "token_ids": digest(json.dumps(ids)),
        "ends": sorted(model.config.eos_token_ids),
        "checkpoint": model.origin,
        "chat_template": task.template and digest(task.template.source),
        "dtype": model.config.dtype,
        "drafts": engine.sizes.drafts,
        "max_length": engine.sizes.max_length,
        **dataclasses.asdict(params),
    }
    with CompletionLines(path, depends_on, {line.index for line in task.prompts.lines}, otherwise) as completions:
        left = [each for each in zip(task.prompts.lines, ids, strict=True) if each[0].index not in completions.done]
        submitted = submit_lines(engine, left, params, task.template, model.tokenizer)
        say(*lines, f"{len(completions.done)} of {len(task.prompts.lines)} lines are in {path} already")
        return complete_lines(engine, submitted, completions, speed)


def length_for(ids: list[int], params: SamplingParams, model: LoadedModel) -> int:
    """Return the engine's max_length for one completion: 4096, or more if prompt and max_tokens need it, up to the context."""
    needed = len(ids) + params.max_tokens
    return min(max(DEFAULT_MAX_LENGTH, needed), model.config.max_position_embeddings)


def say(*lines: str) -> None:
    """Print lines to stderr."""
    print(*lines, sep="\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
