"""What a program does, counted from its text: by hand, by NumPy loops, and on compiled programs of known work."""

from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dcjax.sharding.topology import slice_devices
from dcjax.tools.plan.hlo import Program, _pairs, bits_of

STATE = "(u32[], bf16[36,8,64]{2,1,0}, bf16[64,32]{1,0}, f32[8,32]{1,0})"
LOOP = """\
HloModule jit_step

%fused (param_0: bf16[36,8,64], param_1: s32[]) -> bf16[8,64] {
  %param_0 = bf16[36,8,64]{2,1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %dynamic-slice.1 = bf16[1,8,64]{2,1,0} dynamic-slice(%param_0, %param_1), dynamic_slice_sizes={1,8,64}
  ROOT %bitcast.1 = bf16[8,64]{1,0} bitcast(%dynamic-slice.1)
}

%body (arg: (u32[], bf16[36,8,64], bf16[64,32], f32[8,32])) -> (u32[], bf16[36,8,64], bf16[64,32], f32[8,32]) {
  %arg = STATE parameter(0)
  %i = u32[] get-tuple-element(%arg), index=0
  %two = u32[] constant(2)
  %next = u32[] add(%i, %two)
  %rows = bf16[36,8,64]{2,1,0} get-tuple-element(%arg), index=1
  %kernel = bf16[64,32]{1,0} get-tuple-element(%arg), index=2
  %row = bf16[8,64]{1,0} fusion(%rows, %i), kind=kLoop, calls=%fused
  %product = f32[8,32]{1,0} convolution(%row, %kernel), dim_labels=bf_io->bf, metadata={op_name="jit(step)/dot"}
  %sum = f32[8,32]{1,0} all-reduce(%product), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %out = STATE tuple(%next, %rows, %kernel, %sum)
}

%condition (arg.1: (u32[], bf16[36,8,64], bf16[64,32], f32[8,32])) -> pred[] {
  %arg.1 = STATE parameter(0)
  %j = u32[] get-tuple-element(%arg.1), index=0
  %bound = u32[] constant(36)
  ROOT %less = pred[] compare(%j, %bound), direction=LT
}

ENTRY %main (p: (u32[], bf16[36,8,64], bf16[64,32], f32[8,32])) -> (u32[], bf16[36,8,64], bf16[64,32], f32[8,32]) {
  %p = STATE parameter(0)
  ROOT %loop = STATE while(%p), condition=%condition, body=%body
}
""".replace("STATE", STATE)


def test_a_loop_counts_as_often_as_it_runs():
    cost = Program(LOOP).cost
    turns = 18
    assert cost.flops == {"bf16": turns * 2 * 8 * 64 * 32}
    (one,) = cost.collectives
    result = 8 * 32 * 4
    assert (one.kind, one.group, one.members, one.times) == ("all-reduce", 4, (0, 1, 2, 3), turns)
    assert one.bytes == 2 * result * 3 / 4
    # a row is read of 36, and written; the product reads it and the kernel; the sum reads and writes what it adds;
    # and the counter, of four bytes, is read by two instructions, with what is added, and written
    row, kernel = 8 * 64 * 2, 64 * 32 * 2
    assert cost.bytes == turns * (2 * row + (row + kernel + result) + 2 * result + 4 * 4)


def test_a_loop_of_unknown_length_runs_as_often_as_told():
    unknown = LOOP.replace("%bound = u32[] constant(36)", "%bound = u32[] get-tuple-element(%arg.1), index=0")
    cost = Program(unknown, unknown_trips=5.0).cost
    assert cost.flops == {"bf16": 5 * 2 * 8 * 64 * 32}
    named = unknown.replace("body=%body", 'body=%body, metadata={op_name="jit(step)/turns/while"}')
    cost = Program(named, unknown_trips=5.0, named_trips={"turns": 3.0}).cost
    assert cost.flops == {"bf16": 3 * 2 * 8 * 64 * 32}


@pytest.mark.parametrize(
    ("line", "kind", "group", "arriving"),
    [
        ("bf16[16,4]{1,0} all-gather(%x), replica_groups={{0,2},{1,3}}, dimensions={0}", "all-gather", 2, 128 / 2),
        ("f32[4]{0} reduce-scatter(%x), replica_groups={{0,1,2,3}}, dimensions={0}", "reduce-scatter", 4, 16 * 3),
        ("f32[8]{0} all-to-all(%x), replica_groups=[1,4]<=[4]", "all-to-all", 4, 32 * 3 / 4),
        (
            "(bf16[8]{0}, bf16[8]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}",
            "collective-permute",
            2,
            16,
        ),
        (
            "f32[4]{0} all-reduce(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add",
            "all-reduce",
            4,
            2 * 16 * 3 / 4,
        ),
        ("(bf16[4]{0}, bf16[16]{0}) all-gather-start(%x), replica_groups=[2,4]<=[4,2]T(1,0)", "all-gather", 4, 24),
    ],
)
def test_what_arrives_at_a_chip(line, kind, group, arriving):
    text = f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  %x = f32[8]{{0}} parameter(0)\n  ROOT %y = {line}\n}}\n"
    (one,) = Program(text).cost.collectives
    assert (one.kind, one.group, one.bytes) == (kind, group, arriving)


@given(st.data())
def test_pairs_of_a_convolution_are_those_of_a_loop(data):
    size, window, out = (data.draw(st.integers(1, 6), name) for name in ("size", "window", "out"))
    stride, lhs, rhs = (data.draw(st.integers(1, 3), name) for name in ("stride", "lhs", "rhs"))
    low = data.draw(st.integers(0, 4), "low")
    spread = np.zeros((size - 1) * lhs + 1, int)
    spread[::lhs] = 1
    count = 0
    for place in range(out):
        for part in range(window):
            at = place * stride - low + part * rhs
            count += 0 <= at < len(spread) and spread[at]
    assert _pairs(size, window, out, stride=stride, lhs_dilate=lhs, rhs_dilate=rhs, low=low) == count


@pytest.mark.parametrize(
    ("dtype", "bits"), [("pred", 8), ("bf16", 16), ("f32", 32), ("s8", 8), ("f8e4m3fn", 8), ("s4", 4), ("u64", 64)]
)
def test_bits_of_a_dtype(dtype, bits):
    assert bits_of(dtype) == bits


@pytest.mark.heavy
@pytest.mark.skipif(find_spec("libtpu") is None, reason="no libtpu, which compiles for absent TPUs")
def test_a_compiled_program_does_what_was_written():
    mesh = Mesh(np.array(slice_devices("v5e:2x2")[:1]), ("one",))

    def step(x, kernels):
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))

    text = jax.jit(step).lower(array(64, 128), array(12, 128, 128)).compile().as_text()
    assert Program(text).cost.flops == {"bf16": 12 * 2 * 64 * 128 * 128}


def test_groups_in_an_unknown_notation_are_not_taken_for_none():
    line = "f32[8]{0} all-reduce(%x), replica_groups=ring(8)"
    text = f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  %x = f32[8]{{0}} parameter(0)\n  ROOT %y = {line}\n}}\n"
    with pytest.raises(ValueError, match=r"ring\(8\)"):
        _ = Program(text).cost


@pytest.mark.parametrize(
    ("groups", "members"),
    [
        ("{{0,2},{1,3}}", (0, 2)),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        ("[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("mesh['a'=2,'b'=3,'c'=2] {'a','c'}", (0, 1, 6, 7)),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", (0, 1, 2, 3)),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'c'}", (0, 4)),
        ("{}", ()),
    ],
)
def test_groups_in_xlas_notations(groups, members):
    line = f"f32[8]{{0}} all-gather(%x), replica_groups={groups}, dimensions={{0}}"
    text = f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  %x = f32[8]{{0}} parameter(0)\n  ROOT %y = {line}\n}}\n"
    (one,) = Program(text).cost.collectives
    assert one.members == members


UPDATE = """\
%fused (cache: bf16[64,8,4096,128], at: s32[64,3], new: bf16[64,8,128]) -> bf16[64,8,4096,128] {
  %cache = bf16[64,8,4096,128]{3,2,1,0} parameter(0)
  %at = s32[64,3]{1,0} parameter(1)
  %new = bf16[64,8,128]{2,1,0} parameter(2)
  ROOT %written = bf16[64,8,4096,128]{3,2,1,0} WRITTEN
}

ENTRY %main (p: bf16[64,8,4096,128], q: s32[64,3], r: bf16[64,8,128]) -> bf16[64,8,4096,128] {
  %p = bf16[64,8,4096,128]{3,2,1,0} parameter(0)
  %q = s32[64,3]{1,0} parameter(1)
  %r = bf16[64,8,128]{2,1,0} parameter(2)
  ROOT %out = bf16[64,8,4096,128]{3,2,1,0} fusion(%p, %q, %r), kind=kCustom, calls=%fused
}
"""


@pytest.mark.parametrize(
    "written", ["scatter(%cache, %at, %new), to_apply=%f", "dynamic-update-slice(%cache, %new, %at, %at, %at, %at)"]
)
def test_what_is_written_into_a_cache_counts_and_not_the_cache(written):
    new, places = 64 * 8 * 128 * 2, 64 * 3 * 4
    assert Program(UPDATE.replace("WRITTEN", written)).cost.bytes == 2 * new + places


def test_collectives_in_a_fusion_and_behind_an_asynchronous_start_count():
    text = """\
%gathered (a: f32[2]) -> f32[8] {
  %a = f32[2]{0} parameter(0)
  ROOT %g = f32[8]{0} all-gather(%a), replica_groups=[1,4]<=[4], dimensions={0}
}

ENTRY %main (x: f32[2]) -> f32[8] {
  %x = f32[2]{0} parameter(0)
  %started = ((f32[2]{0}), f32[8]{0}) async-start(%x), calls=%gathered
  %done = f32[8]{0} async-done(%started)
  ROOT %fused = f32[8]{0} fusion(%x), kind=kCustom, calls=%gathered
}
"""
    assert [one.bytes for one in Program(text).cost.collectives] == [24, 24]


@pytest.mark.parametrize(
    ("line", "moved"),
    [
        # 64 numbers of 4 bytes from memory into a core's own, the other way, and within memory
        ("(f32[64]{0:S(1)}, f32[64]{0}, u32[]) copy-start(%x)", 256),
        ("(f32[64]{0}, f32[64]{0:S(1)}, u32[]) copy-start(%own)", 256),
        ("(f32[64]{0}, f32[64]{0}, u32[]) copy-start(%x)", 512),
        # an eighth of them
        ("((f32[64]{0}), f32[8]{0:S(1)}, s32[]) slice-start(%x), slice={[0:8]}", 32),
        ("(s32[], s32[], u32[]) copy-start(%one)", 0),
    ],
)
def test_what_an_asynchronous_copy_moves(line, moved):
    text = f"""\
ENTRY %main (x: f32[64], own: f32[64], one: s32[]) -> f32[8] {{
  %x = f32[64]{{0}} parameter(0)
  %own = f32[64]{{0:S(1)}} parameter(1)
  %one = s32[] parameter(2)
  ROOT %y = {line}
}}
"""
    assert Program(text).cost.bytes == moved


def test_an_all_reduce_of_which_a_part_is_kept_is_a_reduce_scatter():
    text = """\
%all-reduce-scatter.1.clone (a: f32[8]) -> f32[2] {
  %a = f32[8]{0} parameter(0)
  %sum = f32[8]{0} all-reduce(%a), replica_groups=[1,4]<=[4], to_apply=%add
  %at = s32[] constant(0)
  ROOT %part = f32[2]{0} dynamic-slice(%sum, %at), dynamic_slice_sizes={2}
}

ENTRY %main (x: f32[8]) -> f32[2] {
  %x = f32[8]{0} parameter(0)
  ROOT %fused = f32[2]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1.clone
}
"""
    (one,) = Program(text).cost.collectives
    assert (one.kind, one.bytes) == ("reduce-scatter", 3 * 2 * 4)


def test_of_what_there_is_room_for_in_a_ragged_all_to_all_only_what_travels_counts():
    text = """\
ENTRY %main (x: f32[8], room: f32[32]) -> f32[32] {
  %x = f32[8]{0} parameter(0)
  %room = f32[32]{0} parameter(1)
  ROOT %y = f32[32]{0} ragged-all-to-all(%x, %room), replica_groups=[1,4]<=[4]
}
"""
    (one,) = Program(text).cost.collectives
    assert one.bytes == 8 * 4 * 3 / 4


def test_a_counter_that_cannot_be_followed_is_an_error_rather_than_a_guess():
    hidden = LOOP.replace("%next = u32[] add(%i, %two)", "%next = u32[] fusion(%i), kind=kLoop, calls=%hidden")
    with pytest.raises(ValueError, match="what the loop body adds to its counter is not seen"):
        _ = Program(hidden).cost


def test_a_dtype_that_is_not_known_is_an_error():
    with pytest.raises(ValueError, match="quux"):
        bits_of("quux")
