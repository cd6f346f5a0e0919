"""What the Pallas kernels for NVIDIA's Hopper GPUs have in common: who does what in a block, and the ring between them.

Where tiles are many, a block of threads stays on each multiprocessor and works on one output tile after the other. Two of its
warpgroups multiply, 64 rows of a tile each; the third only fetches what they will need next, by TMA, into a ring of slots in
shared memory. Two barriers a slot keep them apart: it was loaded, it was released. The ring goes on from tile to tile, so that
the next one's operands arrive while this one's results are stored.

Step numbers count the slots' uses from the start of the kernel, alike in all warpgroups of a block.
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
"""Rows of it that one warpgroup has: those of one wgmma instruction."""
COLUMNS = 256
"""Columns of an output tile, all of its products together: with WG_M rows they fill half of the registers."""
BLOCK_K = 64
"""Of the contracted dimension at a time; also the columns that are stored at once: 128 bytes, a whole swizzle."""
FETCHING = 2
"""The warpgroup that fetches."""
ALIGN_M = 8
"""Rows of a swizzled tile: only at a multiple of these may a copy of one begin or end in device memory. TMA counts tiles and
rows within a tile as two dimensions, and leaves out what is beyond either."""
SWIZZLED = plgpu.TilingTransform((ALIGN_M, BLOCK_K)), plgpu.SwizzleTransform(128)
"""How operands of wgmma lie in shared memory."""
SHARED_BYTES = 227 * 1024 - 2048
"""Shared memory of a block, less the barriers and what lies between arrays."""
REGISTERS = 504
"""Of one thread of each warpgroup, together."""
STAGES = 4
"""Slots of the ring, where not said otherwise: 48 KiB each, of 227."""


class GPU(NamedTuple):
    """A device."""

    kind: str
    """As JAX names it."""
    num_blocks: int
    """Its multiprocessors."""


def current_gpu() -> GPU:
    """The devices of the current mesh, or JAX's default device."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    if device is not None:
        return GPU(device.device_kind, device.num_cores or 0)
    default: Any = jax.devices()[0]
    return GPU(default.device_kind, getattr(default, "core_count", 0))


def unsupported_reason(dtype: Any) -> str | None:
    """Why these kernels cannot run with this dtype on the GPU at hand, to be read after their name; None if they can."""
    kind = current_gpu().kind
    if not re.search(r"\bG?H(20|100|200|800)\b", kind):
        return f"is written for Hopper (H100, H200 and their kin), and this program is for {kind}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"multiplies bfloat16, and this model computes in {jnp.dtype(dtype).name}"
    return None


class Pipeline(NamedTuple):
    """The barriers of the slots."""

    loaded: Any
    released: Any
    stages: int = STAGES

    def barrier(self, barriers: Any, slot: Any) -> Any:
        """The slot's own of `loaded` or `released`. From jax 0.11 on, one that is alone has no index."""
        return barriers if self.stages == 1 else barriers.at[slot]

    def slot(self, step: Any) -> Any:
        """The slot of a step."""
        return jax.lax.rem(step, jnp.int32(self.stages))

    def producer_acquire(self, step: Any) -> Any:
        """The slot of a step, once its last content was released by both warpgroups."""
        slot = self.slot(step)

        @pl.when(step >= self.stages)
        def _() -> None:
            plgpu.barrier_wait(self.barrier(self.released, slot))

        return slot

    def consumer_wait(self, step: Any) -> Any:
        """The slot of a step, once it is loaded."""
        slot = self.slot(step)
        plgpu.barrier_wait(self.barrier(self.loaded, slot))
        return slot

    def consumer_release(self, step: Any) -> None:
        """Says that this warpgroup has read the slot of a step."""
        plgpu.barrier_arrive(self.barrier(self.released, self.slot(step)))

    def skip(self, begin: Any, end: Any) -> None:
        """Lets steps pass by that only the other warpgroup needs."""

        @pl.loop(begin, end)
        def _(step: Any) -> None:
            self.consumer_wait(step)
            self.consumer_release(step)

    def drain(self, steps: Any) -> None:
        """Waits until all of so many steps were released: at the end, by who fetches."""

        @pl.loop(jnp.maximum(steps - self.stages, 0), steps)
        def _(step: Any) -> None:
            plgpu.barrier_wait(self.barrier(self.released, self.slot(step)))


def multiply(
    pipe: Pipeline, first: Any, steps: Any, columns: int, num_products: int, step: Callable[..., None]
) -> list[jax.Array]:
    """The sums over `steps` steps from `first` on, float32 [WG_M, columns] each.

    Args:
      step: takes the slot, the number of the step from 0 and the accumulators, and issues one `wgmma` for each of these.
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


def store(values: jax.Array, staging: Any, place: Any) -> None:
    """Begins to write values to `place` in device memory, by way of `staging` in shared memory."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # What was staged before.
    staging[...] = values
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, place)


def write(place: Any, values: jax.Array) -> None:
    """place[...] = values, where they do not lie as the registers have them: in rows, or in device memory."""
    if not hasattr(plgpu, "store"):  # jax 0.10, which knows no other way.
        place[...] = values
    else:
        plgpu.store(place, values, optimized=False)


def own_rows() -> Any:
    """Which rows of a tile this warpgroup has, computed anew: what a loop computes alike in every step is kept in registers
    throughout, and where many operands lie takes many."""
    return pl.ds(jax.lax.optimization_barrier(jax.lax.axis_index("warpgroup")) * WG_M, WG_M)


def turned(ref: Any) -> Any:
    """The transposed matrix, as a factor."""
    return ref.transpose((1, 0))


def strip(array: Any, i: int) -> Any:
    """The i-th BLOCK_K columns."""
    return array[:, i * BLOCK_K : (i + 1) * BLOCK_K]


def row_numbers(shape: tuple[int, ...], interpret: Any) -> jax.Array:
    """The row of every value, laid out like accumulators; an interpreter has no layouts and does not know of them."""
    return _numbers(shape, 0, interpret)


def column_numbers(shape: tuple[int, ...], interpret: Any) -> jax.Array:
    """The column of every value, likewise."""
    return _numbers(shape, 1, interpret)


def _numbers(shape: tuple[int, ...], axis: int, interpret: Any) -> jax.Array:
    if interpret is None:
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def constant(value: float, shape: tuple[int, ...], interpret: Any) -> jax.Array:
    """A float32 for every value of accumulators, or with one axis for every row of theirs, laid out like them."""
    values = jnp.full(shape, value, jnp.float32)
    if interpret is not None:
        return values
    return plgpu.layout_cast(values, plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1))


def beside(ref: Any, axis: int, interpret: Any) -> jax.Array:
    """A square of WG_M rows, laid out like accumulators, of a vector in shared memory: its values change along the axis."""
    layout: Any = plgpu.Layout.WGMMA.reduce(1 - axis)
    load: Any = plgpu.load
    # jax 0.10 and 0.11 take a place in the array, 0.12 does not.
    place = ((),) if "idx" in inspect.signature(load).parameters else ()
    values = ref[...] if interpret is not None else load(ref, *place, layout=layout)
    return jax.lax.broadcast_in_dim(values, (WG_M, WG_M), (axis,))


def product_of(left: Any, right: Any) -> jax.Array:
    """left right, both in shared memory, in float32."""

    def multiplied(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, left, right)
        return accumulator[...]

    return pl.run_scoped(multiplied, plgpu.ACC((left.shape[0], right.shape[1]), jnp.float32))


def add_products(totals: Sequence[jax.Array], factors: Sequence[tuple[Any, Any]], interpret: Any) -> Sequence[jax.Array]:
    """total + left right for each pair; the left one may be in registers, which interpreters do not know instructions for."""
    if interpret is not None:

        def product(left: Any, right: Any) -> jax.Array:
            if not isinstance(left, jax.Array):
                return product_of(left, right)
            values = jnp.dot(left, right[...], preferred_element_type=jnp.float32)
            plgpu.commit_smem()  # The instruction reads in the order of asynchronous copies, unlike an array that is loaded.
            return values

        return [total + product(*pair) for total, pair in zip(totals, factors, strict=True)]

    def multiply_all(accumulators: Sequence[Any]) -> None:
        for accumulator, (left, right) in zip(accumulators, factors, strict=True):
            plgpu.wgmma(accumulator, left, right)

    return pl.run_state(multiply_all)([plgpu.ACC.init(total) for total in totals])


def whole_tile(i: Any, size: int, length: int) -> tuple[Any, Any]:
    """Where the i-th of the tiles of `length` places begins, and how many of its first ones the tile before has, too.

    The last tile is moved back to be whole.
    """
    begin = jnp.minimum(i * size, length - size)
    return begin, i * size - begin


def over_tiles(number: Any, num_blocks: int, tile: Callable[[Any, Any], Any], start: Any = 0) -> Any:
    """Every num_sms-th of `number` tiles, for the multiprocessor at hand: tile(index, step) returns the next tile's first step.

    With more than one ring there are as many step numbers, a tuple of them that `start` has the form of.

    Returns:
      The steps of all.
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
    """Runs a kernel.

    Args:
      fetch: what the third warpgroup does.
      work: what the other two do. Both take the ring, a list of the scratch, and the arguments and outputs in device memory.
      arguments: arrays that vary alike over a mesh.
      outputs: shapes and dtypes.
      scratch: what is allocated in shared memory.
      loads: copies into a slot.
      num_sms: blocks of threads: multiprocessors of the device, or of more where each works on one tile only.
      name: of the kernel in the compiled program.
      interpret: None, or parameters of Pallas' GPU interpreter.
      stages: slots of the ring.
      registers: of a thread that multiplies; who fetches has the others.
    """

    def body(*refs: Any) -> None:
        def with_memory(buffers: Sequence[Any], loaded: Any, released: Any) -> None:
            pipe = Pipeline(loaded, released, stages)

            @pl.when(jax.lax.axis_index("warpgroup") == FETCHING)
            def _() -> None:
                plgpu.set_max_registers(REGISTERS - FETCHING * registers, action="decrease")
                fetch(pipe, buffers, *refs)

            @pl.when(jax.lax.axis_index("warpgroup") < FETCHING)
            def _() -> None:
                plgpu.set_max_registers(registers, action="increase")
                work(pipe, buffers, *refs)
                plgpu.wait_smem_to_gmem(0)

        loaded = plgpu.Barrier(num_arrivals=loads, num_barriers=stages)
        released = plgpu.Barrier(num_arrivals=FETCHING, num_barriers=stages)
        pl.run_scoped(with_memory, list(scratch), loaded, released, collective_axes="warpgroup")

    kernel = plgpu.kernel(
        body,
        out_type=list(outputs),
        grid=(num_blocks,),
        grid_names=("sm",),
        num_threads=FETCHING + 1,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            # No warp adds up with another, so that none of the shared memory is for that.
            reduction_scratch_bytes=0,
        ),
        interpret=interpret,
    )
    # JAX forgets over which axes of a mesh the outputs vary.
    return varying_over(kernel(*arguments), varying_axes(arguments))
