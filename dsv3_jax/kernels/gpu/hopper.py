"""Shared parts of the Pallas kernels for NVIDIA's Hopper GPUs: warpgroup roles, the pipeline between them, and the launch.

Where tiles are many, a block of threads stays on each multiprocessor and works on one output tile after the other. Two of its
warpgroups are consumers, which multiply, 64 rows of a tile each. The third is the producer, which only fetches their next
operands by TMA into the slots of a pipeline in shared memory. Two barriers a slot keep them apart: loaded and released. The
pipeline goes on from tile to tile, so that the next one's operands arrive while this one's results are stored.

Step numbers count the uses of slots from the start of the kernel, the same in all warpgroups of a block.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.kernels.vma import varying_axes, varying_over

BLOCK_M = 128
"""Rows of an output tile."""
WG_M = 64
"""Rows of an output tile that one warpgroup has: those of one wgmma instruction."""
COLUMNS = 256
"""Columns of an output tile, summed over its products: with WG_M rows they fill half of the registers."""
BLOCK_K = 64
"""Contracted dimension of a step; also the columns that are stored at once: 128 bytes, a whole swizzle."""
CONSUMERS = 2
"""Warpgroups that multiply; the one after them fetches."""
ALIGN_M = 8
"""Rows of a swizzled tile: only at a multiple of these may a copy of one begin or end in device memory. TMA counts tiles and
rows within a tile as two dimensions, and clips each of them."""
SWIZZLED = plgpu.TilingTransform((ALIGN_M, BLOCK_K)), plgpu.SwizzleTransform(128)
"""Layout of wgmma's operands in shared memory."""
SHARED_BYTES = 227 * 1024 - 2048
"""Bytes of shared memory for the arrays of a block of threads, less those for barriers and gaps between arrays."""
REGISTERS = 504
"""Registers of three threads together, one of each warpgroup."""
STAGES = 4
"""Slots of the pipeline by default: 48 KiB each, of 227."""


class GPU(NamedTuple):
    """Kind and size of a GPU."""

    kind: str
    """JAX's `device_kind`, such as "NVIDIA H200"."""
    num_blocks: int
    """Number of its multiprocessors; 0 if JAX does not report it."""


def current_gpu() -> GPU:
    """Return kind and multiprocessors of the current mesh's devices, or of JAX's first device without such a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    if device is not None:
        return GPU(device.device_kind, device.num_cores or 0)
    default: Any = jax.devices()[0]
    return GPU(default.device_kind, getattr(default, "core_count", 0))


def unsupported_reason(dtype: Any) -> str | None:
    """Return why the current device cannot run these kernels in this dtype, as a predicate ("is written for ..."), or None."""
    kind = current_gpu().kind
    if not re.search(r"\bG?H(20|100|200|800)\b", kind):
        return f"is written for Hopper (H100, H200 and their kin), and this program is for {kind}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"multiplies bfloat16, and this model computes in {jnp.dtype(dtype).name}"
    return None


class Pipeline(NamedTuple):
    """Barriers, one pair a slot, of the `stages` slots that the producer fills and the consumers read."""

    loaded: Any
    released: Any
    stages: int = STAGES

    def _slot(self, step: Any) -> Any:
        return jax.lax.rem(step, jnp.int32(self.stages))

    def _barrier(self, barriers: Any, slot: Any) -> Any:
        # From jax 0.11 on, a single barrier has no index.
        return barriers if self.stages == 1 else barriers.at[slot]

    def producer_acquire(self, step: Any) -> Any:
        """Wait until both consumers released the slot of `step` from its last use, if any; return the slot's index."""
        slot = self._slot(step)

        @pl.when(step >= self.stages)
        def _() -> None:
            plgpu.barrier_wait(self._barrier(self.released, slot))

        return slot

    def consumer_wait(self, step: Any) -> Any:
        """Wait until the slot of `step` is loaded; return the slot's index."""
        slot = self._slot(step)
        plgpu.barrier_wait(self._barrier(self.loaded, slot))
        return slot

    def consumer_release(self, step: Any) -> None:
        """Signal that this warpgroup has read the slot of a step."""
        plgpu.barrier_arrive(self._barrier(self.released, self._slot(step)))

    def skip(self, begin: Any, end: Any) -> None:
        """Wait for the steps [begin, end) and release each unread: only the other consumer needs them."""

        @pl.loop(begin, end)
        def _(step: Any) -> None:
            self.consumer_wait(step)
            self.consumer_release(step)

    def drain(self, steps: Any) -> None:
        """Wait until both consumers released the slots of all `steps` steps; the producer calls it at its end."""

        @pl.loop(jnp.maximum(steps - self.stages, 0), steps)
        def _(step: Any) -> None:
            plgpu.barrier_wait(self._barrier(self.released, self._slot(step)))


def multiply(
    pipe: Pipeline, first: Any, steps: Any, columns: int, num_products: int, step: Callable[..., None]
) -> list[jax.Array]:
    """Return `num_products` sums over `steps` steps from `first` on, float32 [WG_M, columns] each; release their slots.

    `step` takes the slot, the number of the step from 0 and the accumulators, and issues one `wgmma` for each of these.
    """

    def sums(*accumulators: Any) -> list[jax.Array]:
        @pl.loop(0, steps)
        def _(k: Any) -> None:
            step(pipe.consumer_wait(first + k), k, accumulators)
            # All but the products just begun are done, and with them the slot before.
            plgpu.wgmma_wait(num_products)

            @pl.when(k > 0)
            def _() -> None:
                pipe.consumer_release(first + k - 1)

        values = [accumulator[...] for accumulator in accumulators]

        @pl.when(steps > 0)
        def _() -> None:
            pipe.consumer_release(first + steps - 1)

        return values

    return pl.run_scoped(sums, *[plgpu.ACC((WG_M, columns), jnp.float32)] * num_products)


def swizzled(*shape: int) -> Any:
    """Return a shared-memory allocation of this shape in bfloat16, in the layout of wgmma's operands."""
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=SWIZZLED)


def store(values: jax.Array, staging: Any, destination: Any) -> None:
    """Wait until `staging` in shared memory is read, write `values` there, and begin to copy it to device memory."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # For the values staged before.
    staging[...] = values
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, destination)


def write(destination: Any, values: jax.Array) -> None:
    """Write `values` from registers to a destination with another layout: rows in shared memory, or device memory."""
    if not hasattr(plgpu, "store"):  # jax 0.10 has no other way.
        destination[...] = values
    else:
        plgpu.store(destination, values, optimized=False)


def warpgroup_rows() -> Any:
    """Return the slice of this warpgroup's rows of a tile, computed at every call: loop invariants would stay in registers."""
    return pl.ds(jax.lax.optimization_barrier(jax.lax.axis_index("warpgroup")) * WG_M, WG_M)


def transposed(ref: Any) -> Any:
    """Return a transposed view of a matrix in shared memory, as an operand of wgmma."""
    return ref.transpose((1, 0))


def strip(array: Any, i: int) -> Any:
    """Return columns [i BLOCK_K, (i + 1) BLOCK_K) of a matrix."""
    return array[:, i * BLOCK_K : (i + 1) * BLOCK_K]


def iota(shape: tuple[int, ...], axis: int, interpret: Any) -> jax.Array:
    """Return row (axis 0) or column (axis 1) indices, int32 of `shape`, laid out like accumulators unless interpreted."""
    if interpret is None:
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def constant(value: float, shape: tuple[int, ...], interpret: Any) -> jax.Array:
    """Return float32 `shape` filled with `value`, laid out like accumulators, or with one axis like their row vectors."""
    values = jnp.full(shape, value, jnp.float32)
    if interpret is not None:
        return values
    return plgpu.layout_cast(values, plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1))


def broadcast_vector(ref: Any, axis: int, interpret: Any) -> jax.Array:
    """Return a vector in shared memory as a square of WG_M rows, laid out like accumulators; its values change along `axis`."""
    layout: Any = plgpu.Layout.WGMMA.reduce(1 - axis)
    load: Any = plgpu.load
    # jax 0.10 and 0.11 take an index, 0.12 does not.
    index = ((),) if "idx" in inspect.signature(load).parameters else ()
    values = ref[...] if interpret is not None else load(ref, *index, layout=layout)
    return jax.lax.broadcast_in_dim(values, (WG_M, WG_M), (axis,))


def product(left: Any, right: Any) -> jax.Array:
    """Return the matrix product of two matrices in shared memory, float32."""

    def multiplied(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, left, right)
        return accumulator[...]

    return pl.run_scoped(multiplied, plgpu.ACC((left.shape[0], right.shape[1]), jnp.float32))


def add_products(totals: Sequence[jax.Array], factors: Sequence[tuple[Any, Any]], interpret: Any) -> Sequence[jax.Array]:
    """Return total + left @ right for each total and pair; `left` may be in registers, then interpreters use `jnp.dot`."""
    if interpret is not None:

        def interpreted(left: Any, right: Any) -> jax.Array:
            if not isinstance(left, jax.Array):
                return product(left, right)
            values = jnp.dot(left, right[...], preferred_element_type=jnp.float32)
            plgpu.commit_smem()  # The instruction reads in the order of asynchronous copies, unlike an array that is loaded.
            return values

        return [total + interpreted(*pair) for total, pair in zip(totals, factors, strict=True)]

    def multiply_all(accumulators: Sequence[Any]) -> None:
        for accumulator, (left, right) in zip(accumulators, factors, strict=True):
            plgpu.wgmma(accumulator, left, right)

    return pl.run_state(multiply_all)([plgpu.ACC.init(total) for total in totals])


def clamped_tile(i: Any, size: int, length: int) -> tuple[Any, Any]:
    """Return the start of tile i along an axis, and the number of its first elements that the tile before covers, too.

    The last tile is moved back to lie within `length`.
    """
    begin = jnp.minimum(i * size, length - size)
    return begin, i * size - begin


def for_each_tile(number: Any, num_blocks: int, tile: Callable[[Any, Any], Any], start: Any = 0) -> Any:
    """Call tile(index, step), which returns the next tile's first step, for every num_blocks-th index below `number`.

    The first index is this block's. Returns the last call's result; with several pipelines steps are tuples, as `start` is.
    """
    first = jax.lax.axis_index("sm")
    count = jax.lax.div(number - first + num_blocks - 1, jnp.int32(num_blocks))
    return jax.lax.fori_loop(0, count, lambda i, step: tile(first + i * num_blocks, step), jax.tree.map(jnp.int32, start))


def launch(
    fetch: Callable[..., None],
    work: Callable[..., None],
    arguments: Sequence[jax.Array],
    *,
    outputs: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[Any],
    loads: int,
    num_blocks: int,
    name: str,
    interpret: Any,
    stages: int = STAGES,
    registers: int = 232,
) -> list[jax.Array]:
    """Run a kernel of one producer and two consumer warpgroups a block; return the list of its outputs.

    Args:
      fetch: body of the producer.
      work: body of the consumers. Both take the pipeline, the list of scratch, and arguments and outputs in device memory.
      arguments: arrays that vary over the same mesh axes.
      outputs: shapes and dtypes of the results.
      scratch: allocations in shared memory.
      loads: number of copies that fill a slot.
      num_blocks: blocks of threads: one a multiprocessor, or one a tile where each works on one tile only.
      name: of the kernel in the compiled program.
      interpret: None, or parameters of Pallas' GPU interpreter.
      stages: slots of the pipeline.
      registers: of a consumer's thread; the producer's has the rest.
    """

    def body(*refs: Any) -> None:
        def with_memory(buffers: Sequence[Any], loaded: Any, released: Any) -> None:
            pipe = Pipeline(loaded, released, stages)

            @pl.when(jax.lax.axis_index("warpgroup") == CONSUMERS)
            def _() -> None:
                plgpu.set_max_registers(REGISTERS - CONSUMERS * registers, action="decrease")
                fetch(pipe, buffers, *refs)

            @pl.when(jax.lax.axis_index("warpgroup") < CONSUMERS)
            def _() -> None:
                plgpu.set_max_registers(registers, action="increase")
                work(pipe, buffers, *refs)
                plgpu.wait_smem_to_gmem(0)

        loaded = plgpu.Barrier(num_arrivals=loads, num_barriers=stages)
        released = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages)
        pl.run_scoped(with_memory, list(scratch), loaded, released, collective_axes="warpgroup")

    kernel = plgpu.kernel(
        body,
        out_type=list(outputs),
        grid=(num_blocks,),
        grid_names=("sm",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            # No sums across warps, so no shared memory for them.
            reduction_scratch_bytes=0,
        ),
        interpret=interpret,
    )
    # JAX does not keep over which axes of a mesh the outputs vary.
    return varying_over(kernel(*arguments), varying_axes(arguments))
