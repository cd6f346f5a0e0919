"""Collectives of compiled programs: of small ones compiled here for eight devices, and of HLO as the TPU compiler writes it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from dsv3_jax.plan.hlo import Collective, collectives

AXES = {"data": 2, "fsdp": 2, "expert": 2}
SPLIT = PartitionSpec(tuple(AXES))


def compiled(local: Callable[..., Any], *dtypes: Any) -> str:
    """Optimised HLO of `local`, which gets 64 values of every dtype on each device."""
    mesh = Mesh(np.array(jax.devices()).reshape(tuple(AXES.values())), tuple(AXES))
    split = jax.shard_map(local, mesh=mesh, in_specs=(SPLIT,) * len(dtypes), out_specs=SPLIT, check_vma=False)
    return jax.jit(split).lower(*(jax.ShapeDtypeStruct((512,), dtype) for dtype in dtypes)).compile().as_text() or ""


def looped(once: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Three times five: a fori_loop in a scan."""
    return lax.scan(lambda x, _: (lax.fori_loop(0, 5, lambda _, x: jnp.tanh(once(x)), x), None), x, None, length=3)[0]


def found(text: str, mesh: dict[str, int] = AXES, **options: int) -> dict[tuple[str, str], tuple[int, int, bool]]:
    rows = collectives(text, mesh, **options)
    return {(row.kind, row.axis): (row.bytes, row.count, row.data_dependent) for row in rows}


ONCE: dict[str, Callable[[jax.Array], jax.Array]] = {
    "all-reduce": lambda x: lax.psum(x, ("data", "expert")),
    "all-gather": lambda x: lax.all_gather(x, ("fsdp", "expert"))[::-1].reshape(64, 4)[:, 1],
    "reduce-scatter": lambda x: jnp.tile(lax.psum_scatter(x, "expert", tiled=True), 2),
    "all-to-all": lambda x: lax.all_to_all(x, ("data", "fsdp"), 0, 0, tiled=True),
    "collective-permute": lambda x: lax.ppermute(x, "data", [(0, 1), (1, 0)]),
}


@pytest.mark.parametrize(
    ("kind", "axis", "sent"),
    [
        ("all-reduce", "data+expert", 2 * 256 * 3 // 4),
        ("all-gather", "fsdp+expert", 3 * 256),
        ("reduce-scatter", "expert", 256 // 2),
        ("all-to-all", "data+fsdp", 256 * 3 // 4),
        ("collective-permute", "data", 256),
    ],
)
@pytest.mark.parametrize("stated", [True, False])
def test_every_kind_in_nested_loops(kind: str, axis: str, sent: int, stated: bool) -> None:
    """64 float32 on each of 8 devices, 15 times: whether the compiler states the trips or only the condition does."""
    text = compiled(functools.partial(looped, ONCE[kind]), jnp.float32)
    assert "known_trip_count" in text
    if not stated:
        text = re.sub(r", backend_config=.*", "", text)
    assert found(text) == {(kind, axis): (15 * sent, 15, False)}


def test_rows_are_merged_and_sorted_by_bytes() -> None:
    def local(x: jax.Array) -> jax.Array:
        x = looped(ONCE["collective-permute"], x)
        return jnp.tanh(looped(ONCE["all-reduce"], x)) + ONCE["all-reduce"](jnp.sin(x))

    assert collectives(compiled(local, jnp.float32), AXES) == [
        Collective("all-reduce", "data+expert", 16 * 384, 16, False),
        Collective("collective-permute", "data", 15 * 256, 15, False),
    ]


@pytest.mark.parametrize("dtype", ["uint8", "bool", "uint16", "int32", "complex64"])
def test_bytes_follow_the_dtype(dtype: str) -> None:
    text = compiled(ONCE["collective-permute"], jnp.dtype(dtype))
    assert found(text) == {("collective-permute", "data"): (64 * jnp.dtype(dtype).itemsize, 1, False)}


def test_a_loop_that_the_data_ends_counts_once() -> None:
    """Only what is in it is marked: the same collective outside is not, and of the loop's own only this kind is."""

    def local(x: jax.Array, n: jax.Array) -> jax.Array:
        def more(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            return carry[0] + 1, looped(ONCE["all-to-all"], carry[1])

        rounds = lax.pmax(n[0], tuple(AXES))
        return lax.while_loop(lambda carry: carry[0] < rounds, more, (jnp.int32(0), ONCE["all-gather"](x)))[1]

    assert found(compiled(local, jnp.float32, jnp.int32)) == {
        ("all-to-all", "data+fsdp"): (15 * 192, 15, True),
        ("all-gather", "fsdp+expert"): (768, 1, False),
        ("all-reduce", "data+fsdp+expert"): (7, 1, False),
    }


def test_of_a_conditional_the_branch_that_sends_most_counts() -> None:
    def local(x: jax.Array, n: jax.Array) -> jax.Array:
        return lax.cond(n[0] > 0, lambda x: jnp.sin(ONCE["all-to-all"](x)), lambda x: looped(ONCE["collective-permute"], x), x)

    assert found(compiled(local, jnp.float32, jnp.int32)) == {("collective-permute", "data"): (15 * 256, 15, False)}


def test_nothing_is_sent_along_an_axis_of_one() -> None:
    assert found(entry("x = f32[8] all-reduce(%p), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}")) == {}
    assert found(entry("x = f32[8] all-reduce(%p), replica_groups={}"), {"data": 1}) == {}


@pytest.mark.parametrize("mesh", [{"fsdp": 4}, {"data": 2, "fsdp": 8}])
def test_another_mesh_is_refused(mesh: dict[str, int]) -> None:
    text = compiled(ONCE["all-reduce"], jnp.float32)
    with pytest.raises(ValueError, match=r"8 devices in each of 1 slice.*pass the mesh"):
        collectives(text, mesh)
    # And where the text does not say how many there are, by the devices it names.
    if mesh["fsdp"] == 4:
        with pytest.raises(ValueError, match=r"names device 7, but the mesh .* has 4"):
            collectives(text.replace("num_partitions=8", ""), mesh)


# ---- HLO as compilers write it: excerpts of programs compiled for TPU topologies, shapes reduced.


def entry(*lines: str, before: str = "", header: str = "HloModule m") -> str:
    body = "\n".join(f"  %{line}" for line in lines)
    return f"{header}\n{before}\nENTRY %main (p: f32[8]) -> f32[8] {{\n  %p = f32[8]{{0:T(128)}} parameter(0)\n{body}\n}}\n"


MESH = {"data": 2, "fsdp": 4, "none": 1, "expert": 2}


@pytest.mark.parametrize(
    ("groups", "axis"),
    [
        ("{}", "data+fsdp+expert"),
        ("{{0,1,2,3,4,5,6,7},{8,9,10,11,12,13,14,15}}", "fsdp+expert"),
        ("{{0,8},{1,9},{2,10},{3,11},{4,12},{5,13},{6,14},{7,15}}", "data"),
        ("[8,2]<=[16]", "expert"),
        ("[8,2]<=[2,8]T(1,0)", "data"),
        ("[4,4]<=[2,4,2]T(0,2,1)", "fsdp"),
        ("[4,4]<=[2,4,2]T(1,2,0)", "data+expert"),
        ("[1,16]<=[16]", "data+fsdp+expert"),
        ("mesh['a'=2,'b'=4,'c'=2] {'b'}", "fsdp"),
        ("mesh['a'=2,'b'=4,'c'=2] {'c','a'}", "data+expert"),
        ("mesh['axis_0'=8,'axis_1'=1,'axis_2'=2], device_ids=([2,8]T(1,0)) {'axis_0'}", "fsdp+expert"),
        ("mesh['axis_0'=8,'axis_1'=1,'axis_2'=2], device_ids=([2,8]T(1,0)) {'axis_2'}", "data"),
        ("mesh['a'=2,'b'=8], device_ids=(0,2,4,6,8,10,12,14,1,3,5,7,9,11,13,15) {'a'}", "expert"),
        ("mesh['a'=16] {'a':(2)4}", "fsdp"),
        ("mesh['a'=16] {'a':(8)2,'a':(1)2}", "data+expert"),
        # Half of an axis, and groups of two sizes.
        ("[8,2]<=[4,2,2]T(0,2,1)", "?"),
        ("{{0,1,2,3,4,5,6,7,8,9,10,11},{12,13,14,15}}", "?"),
    ],
)
def test_groups_become_axes(groups: str, axis: str) -> None:
    text = entry(f"x = f32[8]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, use_global_device_ids=true")
    assert [row.axis for row in collectives(text, MESH)] == [axis]


@pytest.mark.parametrize(
    ("pairs", "axis"),
    [("{{0,2},{2,4},{4,6},{6,0}}", "fsdp"), ("{{0,1},{1,2},{2,3},{3,0}}", "fsdp+expert"), ("{{3,11}}", "data")],
)
def test_pairs_become_axes(pairs: str, axis: str) -> None:
    """A ring along two axes, or one pair: no groups to be whole."""
    assert found(entry(f"x = f32[8] collective-permute(%p), source_target_pairs={pairs}"), MESH) == {
        ("collective-permute", axis): (32, 1, False)
    }


@pytest.mark.parametrize(
    ("type_", "size"),
    [
        ("s4[3,5]{1,0:T(8,128)(8,1)E(4)}", 8),
        ("u4[8]", 4),
        ("f8e5m2[3]", 3),
        ("pred[]", 1),
        ("bf16[2,3]{1,0:T(8,128)(2,1)S(1)}", 12),
        ("c64[2]", 16),
        ("(f32[2]{0}, /*index=1*/u32[3]{0}, token[])", 20),
    ],
)
def test_bytes_of_types(type_: str, size: int) -> None:
    text = entry(f"x = {type_} collective-permute(%p), source_target_pairs={{{{0,1}}}}")
    assert [row.bytes for row in collectives(text, AXES)] == [size]


RING = "channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}"


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (
            f"s = (f32[4]{{0}}, f32[8]{{0}}) all-gather-start(%p), {RING}, dimensions={{0}}",
            "e = f32[8]{0} all-gather-done(%s)",
            ("all-gather", 16),
        ),
        (
            f"s = ((f32[4]{{0}}, s8[4]{{0}}), (f32[8]{{0}}, s8[8]{{0}})) all-gather-start(%p, %q), {RING}, dimensions={{0}}",
            "e = (f32[8]{0}, s8[8]{0}) all-gather-done(%s)",
            ("all-gather", 20),
        ),
        (
            f"s = (f32[8]{{0}}, f32[2]{{0}}) all-reduce-start(%p, %q), {RING}, to_apply=%add",
            "e = (f32[8]{0}, f32[2]{0}) all-reduce-done(%s)",
            ("all-reduce", 40),
        ),
        (
            "s = (bf16[1,4]{1,0}, bf16[1,4]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p), "
            "channel_id=4, source_target_pairs={{0,1},{1,0}}",
            "e = bf16[1,4]{1,0} collective-permute-done(%s)",
            ("collective-permute", 8),
        ),
        (
            f"s = ((f32[8]{{0}}), f32[4]{{0}}) reduce-scatter-start(%p), {RING}, dimensions={{0}}, to_apply=%add",
            "e = f32[4]{0} reduce-scatter-done(%s)",
            ("reduce-scatter", 16),
        ),
        (
            "s = ((f32[8]{0}), f32[4]{0}, u32[]) async-start(%p), calls=%wrapped",
            "e = f32[4]{0} async-done(%s), calls=%wrapped",
            ("reduce-scatter", 16),
        ),
        # To the sparse cores of tpu7x.
        (
            's = ((f32[8]{0}, token[]), f32[4]{0}) call-start(%p), async_execution_thread="sparsecore", to_apply=%wrapped',
            "e = f32[4]{0} call-done(%s)",
            ("reduce-scatter", 16),
        ),
    ],
)
def test_asynchronous_collectives_count_once(start: str, end: str, expected: tuple[str, int]) -> None:
    before = f"""
%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}}

%wrapped (x: f32[8]) -> f32[4] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %r = f32[4]{{0}} reduce-scatter(%x), {RING}, dimensions={{0}}, to_apply=%add
}}, execution_thread="sparsecore"
"""
    assert found(entry(start, end, before=before)) == {(expected[0], "expert"): (expected[1], 1, False)}


def test_fusions_that_compute_beside_a_collective_count_it_once() -> None:
    """The TPU's async collective fusion: a start, steps beside products, and an end, each with the collective in it."""
    gather = "all-gather(%x), channel_id=28, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}"
    gather += ', use_global_device_ids=true, frontend_attributes={chain_id="0"}, metadata={op_name="dot"}'

    def part(name: str, root: str) -> str:
        return (
            f"\n%{name} (x: f32[8]) -> f32[64] {{\n  %x = f32[8] parameter(0)\n"
            f"  %g.{name} = f32[64]{{0}} {gather}\n  ROOT %r.{name} = {root}\n}}\n"
        )

    before = part("start", '(f32[8], f32[64], u32[]) custom-call(%x, %g.start), custom_call_target="AsyncCollectiveStart"')
    before += part("step", "(f32[64], f32[8]) tuple(%g.step, %x)")
    before += part("end", 'f32[64] custom-call(%x, %g.end), custom_call_target="AsyncCollectiveDone"')
    fusions = [
        f"f{i} = f32[64] fusion(%p), kind=kCustom, calls=%{name}" for i, name in enumerate(["start", "step", "step", "end"])
    ]
    assert found(entry(*fusions, before=before)) == {("all-gather", "data+fsdp+expert"): (7 * 32, 1, False)}


def test_a_fused_all_reduce_and_slice_is_a_reduce_scatter() -> None:
    """It sends the rows that the compiler pads with too: here 10 of 8."""
    before = """
%all-reduce-scatter.4 (x: f32[8,4]) -> f32[5,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %pad = f32[10,4]{1,0} pad(%x, %zero), padding=0_2x0_0
  %sum = f32[10,4]{1,0} all-reduce(%pad), channel_id=21, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  ROOT %part = f32[5,4]{1,0} dynamic-slice(%sum, %i, %zero), dynamic_slice_sizes={5,4}
}
"""
    text = entry("f = f32[5,4]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.4", before=before)
    assert found(text) == {("reduce-scatter", "expert"): (80, 1, False)}


def test_between_slices() -> None:
    """One slice's program: its groups are within the slice, and the host reduces across."""
    across = (
        ', channel_id=4, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
    )
    across += '_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}'
    text = entry(
        "g = f32[8] all-gather(%p), replica_groups={{0,2},{1,3}}, dimensions={0}",
        "h = f32[8] all-reduce(%g), replica_groups={{0,1,2,3}}, to_apply=%add",
        "t = token[] after-all()",
        f"s = (f32[8]{{0}}, u32[], token[]) send(%p, %t){across}",
        f"r = (f32[8]{{0}}, u32[], token[]) recv(%t){across}",
        f"sd = token[] send-done(%s){across}",
        f"rd = (f32[8]{{0}}, token[]) recv-done(%r){across}",
        header="HloModule m, is_scheduled=true, num_partitions=4",
    )
    assert found(text, AXES, slices=2) == {
        ("all-gather", "fsdp"): (16, 1, False),
        ("all-reduce", "fsdp+expert"): (48, 1, False),
        ("all-reduce", "data"): (32, 1, False),
    }
    gathered, scattered = (text.replace("ALL_REDUCE", kind) for kind in ("ALL_GATHER", "REDUCE_SCATTER"))
    assert found(gathered, AXES, slices=2)["all-gather", "data"] == (32, 1, False)
    assert found(scattered, AXES, slices=2)["reduce-scatter", "data"] == (16, 1, False)
    # Four replicas over the two slices, two of them in each: what goes along `data` within a slice is told from what leaves it.
    four = collectives(text, {"data": 4, "fsdp": 2}, slices=2)
    assert {(one.kind, one.axis, one.bytes, one.across_slices) for one in four} == {
        ("all-gather", "data", 16, False), ("all-reduce", "data+fsdp", 48, False), ("all-reduce", "data", 32, True),
    }  # fmt: skip
    inside = text.replace("{{0,1,2,3}}", "{{0,2},{1,3}}")
    both = [one for one in collectives(inside, {"data": 4, "fsdp": 2}, slices=2) if one.kind == "all-reduce"]
    assert sorted((one.axis, one.bytes, one.count, one.across_slices) for one in both) == [
        ("data", 32, 1, False), ("data", 32, 1, True),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="4 devices in each of 1 slice"):
        collectives(text, AXES)
    with pytest.raises(ValueError, match="does not split over 2 slices"):
        collectives(text, {"data": 1, "fsdp": 8}, slices=2)


def test_ragged_rows_are_the_callers_and_as_wide_as_the_array() -> None:
    line = "x = bf16[8,2]{1,0} ragged-all-to-all(%p, %q, %a, %b, %c, /*index=5*/%d), replica_groups={{0,1},{2,3},{4,5},{6,7}}"
    assert found(entry(line)) == {("ragged-all-to-all", "expert"): (0, 1, False)}
    assert found(entry(line, line.replace("x =", "y =")), ragged_rows=25) == {("ragged-all-to-all", "expert"): (200, 2, False)}
    # The rows of an asynchronous one are those of its result, whose buffer is larger than what is sent from.
    started = line.replace(
        "bf16[8,2]{1,0} ragged-all-to-all", "((bf16[6,2], bf16[8,2]), bf16[8,2], u32[]) ragged-all-to-all-start"
    )
    assert found(entry(started), ragged_rows=25) == {("ragged-all-to-all", "expert"): (100, 1, False)}


def loop(
    condition: str, *, start: str = "constant(2)", after: str = "add(%i, %two)", bound: str = "constant(11)", stated: str = ""
) -> str:
    """A loop as the TPU compiler leaves it, without its trips: the carry is (counter, bound, array)."""
    carry = "(s32[], s32[], f32[8])"
    before = f"""
%fused (f0: s32[], f1: s32[]) -> pred[] {{
  %f1 = s32[] parameter(1)
  %f0 = s32[] parameter(0)
  ROOT %lt = pred[] compare(%f0, %f1), direction=LT
}}

%body (carry: {carry}) -> {carry} {{
  %carry = {carry} parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%carry), index=0
  %n = s32[]{{:T(128)}} get-tuple-element(%carry), index=1
  %x = f32[8] get-tuple-element(%carry), index=2
  %two = s32[] constant(2)
  %next = s32[] {after}
  %y = f32[8] collective-permute(%x), source_target_pairs={{{{0,1}}}}
  ROOT %out = {carry} tuple(%next, %n, %y)
}}

%condition (carry: {carry}) -> pred[] {{
  %carry = {carry} parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%carry), index=0
  %n = s32[]{{:T(128)}} get-tuple-element(%carry), index=1
  %eleven = s32[] constant(11), metadata={{op_name="x"}}
  %three = s32[] constant(3)
  %later = s32[] add(%three, %i)
  ROOT %go = pred[] {condition}
}}
"""
    return entry(
        f"start = s32[] {start}",
        f"bound = s32[] {bound}",
        "copied = s32[] copy(%bound)",
        f"init = {carry} tuple(%start, %copied, %p)",
        f"loop = {carry} while(%init), condition=%condition, body=%body{stated}",
        before=before,
    )


KNOWN = ', metadata={op_name="while"}, backend_config={"known_trip_count":{"n":"9"},"known_init_step":{"init":"0","step":"1"}}'


@pytest.mark.parametrize(
    ("text", "trips"),
    [
        (loop("compare(%i, %eleven), direction=LT"), 5),  # 2 4 6 8 10
        (loop("compare(%i, %n), direction=LT"), 5),
        (loop("compare(%n, %i), direction=GE", bound="constant(12)"), 6),
        (loop("compare(%i, %n), direction=LE", bound="constant(12)"), 6),
        (loop("compare(%i, %n), direction=NE", bound="constant(12)"), 5),
        (loop("compare(%i, %n), direction=NE"), None),  # steps over it
        (loop("fusion(%i, %eleven), kind=kLoop, calls=%fused"), 5),
        (loop("fusion(%i, %n), kind=kLoop, calls=%fused"), 5),
        (loop("compare(%i, %n), direction=GT", start="constant(5)", after="subtract(%i, %two)", bound="constant(-1)"), 3),
        (loop("compare(%i, %n), direction=LT", start="constant(20)"), 0),
        (loop("compare(%i, %n), direction=LT", bound="reduce(%p)"), None),
        (loop("compare(%i, %n), direction=LT", start="convert(%p)"), None),
        (loop("compare(%i, %n), direction=LT", after="multiply(%i, %two)"), None),
        (loop("compare(%i, %n), direction=LT", after="add(%i, %n)"), None),
        (loop("compare(%i, %n), direction=LT", after="subtract(%i, %two)"), None),
        (loop("compare(%i, %n), direction=LT", after="subtract(%two, %i)"), None),
        (loop("compare(%i, %n), direction=LT", after="add(%n, %two)"), None),
        (loop("compare(%later, %n), direction=LT"), 3),  # 5 7 9
        (loop("and(%i, %n)"), None),
        (loop("and(%i, %n)", stated=KNOWN), 9),
    ],
)
def test_trips_from_the_condition(text: str, trips: int | None) -> None:
    expected = {("collective-permute", "expert"): (32 * (trips or 1), trips or 1, trips is None)}
    assert found(text) == (expected if trips != 0 else {})


def nested(*, inner_bound: str = "%n", outer_next: str = "%n", second_start: str = "%kept") -> str:
    """A loop of 2 rounds around one of 7 that gets its bound through the carries, then a loop that starts where those began.

    The condition of the inner one sends something too.
    """
    carry, counter = "(s32[], s32[], f32[8])", "s32[] get-tuple-element"
    before = "".join(
        f"""
%condition.{name} (c.{name}: {carry}) -> pred[] {{
  %c.{name} = {carry} parameter(0)
  %i.{name} = {counter}(%c.{name}), index=0
  %n.{name} = {counter}(%c.{name}), index=1
  %two.{name} = s32[] constant(2)
  {sends}
  ROOT %go.{name} = pred[] compare(%i.{name}, {bound}), direction=LT
}}

%body.{name} (b.{name}: {carry}) -> {carry} {{
  %b.{name} = {carry} parameter(0)
  %j = {counter}(%b.{name}), index=0
  %n = {counter}(%b.{name}), index=1
  %x = f32[8] get-tuple-element(%b.{name}), index=2
  %zero = s32[] constant(0)
  %one = s32[] constant(1)
  %more = s32[] add(%n, %one)
  %next = s32[] add(%j, %one)
  {runs}
  ROOT %out.{name} = {carry} tuple(%next, {after}, %y)
}}
"""
        for name, bound, sends, runs, after in (
            (
                "inner",
                "%n.inner",
                "%s = f32[4] collective-permute(%q), source_target_pairs={{0,4}}",
                "%y = f32[8] collective-permute(%x), source_target_pairs={{0,1}}",
                "%n",
            ),
            (
                "outer",
                "%two.outer",
                "",
                f"%init = {carry} tuple(%zero, {inner_bound}, %x)\n"
                f"  %loop = {carry} while(%init), condition=%condition.inner, body=%body.inner\n"
                "  %y = f32[8] get-tuple-element(%loop), index=2",
                outer_next,
            ),
        )
    )
    return entry(
        "zero = s32[] constant(0)",
        "seven = s32[] constant(7)",
        f"init = {carry} tuple(%zero, %seven, %p)",
        f"first = {carry} while(%init), condition=%condition.outer, body=%body.outer",
        f"kept = {counter}(%first), index=1",
        f"counted = {counter}(%first), index=0",
        f"second = {carry} tuple(%zero, {second_start}, %p)",
        f"last = {carry} while(%second), condition=%condition.inner, body=%body.inner",
        before=before,
    )


@pytest.mark.parametrize(
    ("text", "body", "condition", "data_dependent"),
    [
        (nested(), 2 * 7 + 7, 2 * 8 + 8, False),
        (nested(inner_bound="%one"), 2 * 1 + 7, 2 * 2 + 8, False),
        # What the outer loop changes bounds the inner one, and the one after it, by something that no text says.
        (nested(outer_next="%more"), 2 * 1 + 1, 2 * 1 + 1, True),
        (nested(second_start="%counted"), 2 * 7 + 1, 2 * 8 + 1, True),
    ],
)
def test_bounds_that_outer_loops_carry(text: str, body: int, condition: int, data_dependent: bool) -> None:
    assert found(text) == {
        ("collective-permute", "expert"): (32 * body, body, data_dependent),
        ("collective-permute", "data"): (16 * condition, condition, data_dependent),
    }


def test_a_bound_that_a_branch_gets_as_its_parameter() -> None:
    """Operand 0 of a conditional is the choice, not what the branch gets: the bound is not to be mistaken for it."""
    before, _, main = nested().partition("\nENTRY")
    lines = re.findall(r"(  %(?:zero|init|first) = .*)", main)
    branch = "\n%branch (seven: s32[]) -> f32[8] {\n  %seven = s32[] parameter(0)\n" + "\n".join(lines) + "\n}\n"
    text = entry(
        "which = s32[] constant(5)",
        "c = f32[8] conditional(%which, %p, %p), branch_computations={%branch, %branch}",
        before=before.partition("\n")[2] + branch,
    )
    assert found(text)["collective-permute", "expert"] == (2 * 32, 2, True)
    assert ("collective-permute", "expert") not in found(text, open_trips=0)
