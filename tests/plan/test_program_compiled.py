"""What is read off the compiler: its refusals, and the kernels in its programs."""

from __future__ import annotations

from dsv3_jax.plan.program import GIB, kernels_in, read_refusal


def test_refusals() -> None:
    late = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 97.50G of 95.74G hbm. Exceeded by 1.76G."
    early = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (49.03G) exceeds "
        "available HBM (31.25G)."
    )
    assert read_refusal(late, 10) == (None, round(97.5 * GIB))
    assert read_refusal(early, 10) == (round(49.03 * GIB), round(49.03 * GIB) + 10)
    assert read_refusal("INTERNAL: something else", 10) is None


def test_kernels_are_found_by_their_names() -> None:
    call = ' = bf16[8,128]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={}'
    names = "expert_down.3", "expert_down.3.remat", "transpose_jvp_expert_dx__.20", "jvp_expert_gate_up_.1", "splash_mha_fwd"
    other = '  %other.1 = f32[] custom-call(), custom_call_target="x"'
    lines = [*(f"  %{name}{call}" for name in names), f"  ROOT %expert_down.4{call}", other]
    assert kernels_in("\n".join(lines)) == {"expert_down": 3, "expert_dx": 1, "expert_gate_up": 1, "splash_mha_fwd": 1}
