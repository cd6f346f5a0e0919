"""An engine on a mesh of two processes' devices: `python -m tests.infer.one_of_two_processes ADDRESS INDEX`."""

from __future__ import annotations

import json
import sys

import jax

jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))

from dsv3_jax.config import MeshConfig  # noqa: E402
from dsv3_jax.infer import Engine, SamplingParams  # noqa: E402
from dsv3_jax.parallel.mesh import make_mesh  # noqa: E402
from tests.infer.test_identity import ONE_LAYER  # noqa: E402
from tests.model.tiny import random_variables  # noqa: E402

mesh = make_mesh(MeshConfig(expert=4, tensor=2))
engine = Engine(ONE_LAYER, random_variables(ONE_LAYER), max_batch=4, max_length=64, mesh=mesh, drafts=1, page_size=16, chunk=16)
prompts = [[1, 2, 3], [4] * 9, [7, 8]]
print(json.dumps([completion.tokens for completion in engine.generate(prompts, SamplingParams(max_tokens=8))]))
