"""The walk through a program's schedule, on schedules whose time is worked out by hand.

The device is v5e: 1.5 GHz, so that 1,500 cycles are a microsecond; 45 GB/s a link, and 819 GB/s of HBM.
"""

from types import SimpleNamespace

import pytest

from stepjax.planning import hlo
from stepjax.planning.core_time import flop_per_bundle
from stepjax.planning.estimate import EXPOSED_COLLECTIVES, EXPOSED_COPIES, estimate
from stepjax.planning.network import HOP_SECONDS, Network
from stepjax.planning.topologies import find

US = 1e-6
GATHER = 90_000 * 1 / 2 / 45e9 + HOP_SECONDS  # of 90,000 bytes by two neighbours: 2 us


def cycles(microseconds):
    return f'backend_config={{"window_config":{{"estimated_cycles":"{round(1500 * microseconds)}"}}}}'


def work(name, microseconds, operands="%x", scope="jit(step)/decoder/mlp/dot_general"):
    return (
        f'%{name} = bf16[8]{{0}} fusion({operands}), kind=kLoop, calls=%computed, metadata={{op_name="{scope}"}}, '
        f"{cycles(microseconds)}"
    )


def play(lines, others="", name="v5e-4", slices=1, **options):
    """The estimate of an entry computation with these lines."""
    body = "\n".join(f"  {line}" for line in lines)
    text = (
        "HloModule jit_step, is_scheduled=true\n\n"
        "%computed (p: bf16[8]) -> bf16[8] {\n  ROOT %p = bf16[8]{0} parameter(0)\n}\n\n"
        f"{others}\n"
        f"ENTRY %main (x: bf16[8]) -> bf16[8] {{\n  %x = bf16[8]{{0}} parameter(0)\n{body}\n}}\n"
    )
    topology = find(name, slices)
    places = [(x, y, 0) for x in range(topology.shape[0]) for y in range(topology.shape[1])]
    devices = [SimpleNamespace(slice_index=0, coords=place) for place in places]
    return estimate(hlo.read(text), Network(topology, devices), **options)


START = (
    "%s = (bf16[22500]{0}, bf16[45000]{0}) all-gather-start(%x), channel_id=1, replica_groups={{0,1}}, dimensions={0}"
)
DONE = "%d = bf16[45000]{0} all-gather-done(%s)"
SYNC = "%g = bf16[45000]{0} all-gather(%x), channel_id=1, replica_groups={{0,1}}, dimensions={0}"


def test_operations_follow_each_other():
    found = play([work("a", 3), work("b", 4)])
    assert found.seconds == pytest.approx(7 * US)
    assert found.seconds_by("part") == {("decoder MLP",): pytest.approx(7 * US)}
    assert not found.unknown


def test_a_synchronous_collective_is_all_exposed():
    found = play([work("a", 3), SYNC])
    assert found.seconds == pytest.approx(3 * US + GATHER)
    assert found.traffic[0].exposed == pytest.approx(GATHER)
    assert found.traffic[0].wire_bytes == 45_000


def test_a_gather_hides_behind_as_much_work():
    found = play([START, work("a", 5), DONE])
    assert found.seconds == pytest.approx(5 * US)
    assert found.traffic[0].exposed == 0 and found.traffic[0].seconds == pytest.approx(GATHER)


def test_what_does_not_hide_is_exposed():
    found = play([START, work("a", 0.5), DONE, work("b", 1)])
    assert found.seconds == pytest.approx(GATHER + 1 * US)
    assert found.seconds_by("part")[EXPOSED_COLLECTIVES,] == pytest.approx(GATHER - 0.5 * US)


def test_transfers_queue_on_the_wires():
    second = START.replace("%s =", "%s2 =").replace("channel_id=1", "channel_id=2")
    found = play([START, second, work("a", 3), DONE, DONE.replace("%d =", "%d2 =").replace("(%s)", "(%s2)")])
    assert found.seconds == pytest.approx(2 * GATHER)
    assert [t.exposed for t in found.traffic] == [0, pytest.approx(2 * GATHER - 3 * US)]


def test_permutations_in_opposite_directions_do_not_queue():
    line = (
        "%{0} = (bf16[45000]{{0}}, bf16[45000]{{0}}, u32[], u32[]) collective-permute-start(%big), channel_id=1, "
        "source_target_pairs={{{{{1},{2}}},{{{2},{1}}}}}"
    )
    done = "%{0}d = bf16[45000]{{0}} collective-permute-done(%{0})"
    big = "%big = bf16[45000]{0} bitcast(%x)"
    one = 90_000 / 45e9 + HOP_SECONDS
    both = play([big, line.format("s", 0, 1), line.format("t", 1, 0), done.format("s"), done.format("t")])
    assert both.seconds == pytest.approx(one)
    same = play([big, line.format("s", 0, 1), line.format("t", 0, 1), done.format("s"), done.format("t")])
    assert same.seconds == pytest.approx(2 * one)


def test_a_loop_counts_as_often_as_it_runs():
    others = f"""\
%body (p: (s32[], bf16[8])) -> (s32[], bf16[8]) {{
  %p = (s32[], bf16[8]{{0}}) parameter(0)
  %x = bf16[8]{{0}} get-tuple-element(%p), index=1
  {START}
  {work("a", 0.5)}
  {DONE}
  ROOT %t = (s32[], bf16[8]{{0}}) tuple(%x)
}}

%condition (p: (s32[], bf16[8])) -> pred[] {{
  %p = (s32[], bf16[8]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(10)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}}
"""
    loop = "%w = (s32[], bf16[8]{0}) while(%t0), condition=%condition, body=%body"
    found = play([loop], others)
    assert found.seconds == pytest.approx(10 * GATHER)
    assert found.traffic[0].times == 10
    assert found.traffic[0].wire_bytes == 450_000
    assert found.traffic[0].exposed == pytest.approx(10 * (GATHER - 0.5 * US))
    unknown = play([loop], others.replace("compare(%i, %n)", "compare(%i, %i)"))
    assert unknown.seconds == pytest.approx(GATHER)
    assert list(unknown.unknown.values()) == [1] and "loop of unknown length" in next(iter(unknown.unknown))


def test_of_branches_the_longest_counts():
    def computation(name, microseconds):
        line = work("a", microseconds, "%p")
        return f"%{name} (p: bf16[8]) -> bf16[8] {{\n  %p = bf16[8]{{0}} parameter(0)\n  ROOT {line}\n}}\n\n"

    branches = computation("one", 2) + computation("two", 6)
    line = "%c = bf16[8]{0} conditional(%x, %x, %x), branch_computations={%one, %two}"
    assert play([line], branches).seconds == pytest.approx(6 * US)


def test_a_call_is_walked_through():
    callee = f"%callee (p: bf16[8]) -> bf16[8] {{\n  %p = bf16[8]{{0}} parameter(0)\n  ROOT {work('a', 2, '%p')}\n}}\n"
    assert play(["%c = bf16[8]{0} call(%x), to_apply=%callee"], callee).seconds == pytest.approx(2 * US)


def test_a_collective_wrapped_in_an_asynchronous_computation():
    wrapped = (
        "%wrapped (p: bf16[22500]) -> bf16[45000] {\n  %p = bf16[22500]{0} parameter(0)\n"
        "  ROOT %g = bf16[45000]{0} all-gather(%p), channel_id=1, replica_groups={{0,1}}, dimensions={0}\n}\n"
    )
    start = "%s = ((bf16[22500]{0}), bf16[45000]{0}, u32[]) async-start(%x), calls=%wrapped"
    found = play([start, work("a", 0.5), "%d = bf16[45000]{0} async-done(%s)"], wrapped)
    assert found.seconds == pytest.approx(GATHER)
    assert found.traffic[0].kind == "all-gather"


SPARSECORE = (
    "%called (p: bf16[45000]) -> bf16[22500] {\n  %p = bf16[45000]{0} parameter(0)\n"
    "  ROOT %rs = bf16[22500]{0} reduce-scatter(%p), channel_id=2, replica_groups={{0,1}}, dimensions={0}\n}\n"
)


def test_a_collective_on_the_sparsecore_begins_when_its_operand_is_there():
    lines = [
        '%s = ((), ()) custom-call-start(), async_execution_thread="sparsecore", called_computations={%called}',
        work("a", 5),
        "%u = ((bf16[45000]{0}), bf16[22500]{0}) custom-call-update(%s, %a)",
        work("b", 0.5),
        "%d = bf16[22500]{0} custom-call-done(%u)",
    ]
    found = play(lines, SPARSECORE)
    assert found.seconds == pytest.approx(5 * US + GATHER)
    assert found.traffic[0].kind == "reduce-scatter"


def fused(kind, number):
    calls = f', custom_call_target="{kind}"' if kind else ""
    tail = f"  ROOT %c.{number} = bf16[45000]{{0}} custom-call(%g.{number}){calls}\n" if kind else ""
    return (
        f"%fused.{number} (p: bf16[22500]) -> bf16[45000] {{\n  %p = bf16[22500]{{0}} parameter(0)\n"
        f"  %g.{number} = bf16[45000]{{0}} all-gather(%p), channel_id=33, "
        f"replica_groups={{{{0,1}}}}, dimensions={{0}}\n{tail}}}\n\n"
    )


def test_a_gather_fused_with_the_work_of_several_fusions():
    others = fused("AsyncCollectiveStart", 1) + fused("", 2) + fused("AsyncCollectiveDone", 3)
    line = "%f.{0} = bf16[45000]{{0}} fusion(%x), kind=kCustom, calls=%fused.{0}, {1}"
    lines = [line.format(1, ""), line.format(2, cycles(0.5)), line.format(3, "")]
    found = play(lines, others)
    assert found.seconds == pytest.approx(GATHER)
    assert [(t.kind, t.times) for t in found.traffic] == [("all-gather", 1)]
    hidden = play([line.format(1, ""), line.format(2, cycles(9)), line.format(3, "")], others)
    assert hidden.seconds == pytest.approx(9 * US)


def test_a_collective_and_all_of_its_work_in_one_fusion():
    line = f"%f = bf16[45000]{{0}} fusion(%x), kind=kCustom, calls=%fused.2, {cycles(1)}"
    assert play([line], fused("", 2)).seconds == pytest.approx(1 * US + GATHER)


def test_an_all_reduce_fused_with_a_slice_is_a_reduce_scatter():
    others = (
        "%ars (p: bf16[45000]) -> bf16[22500] {\n  %p = bf16[45000]{0} parameter(0)\n"
        "  %ar = bf16[45000]{0} all-reduce(%p), channel_id=1, replica_groups={{0,1}}\n"
        "  ROOT %s = bf16[22500]{0} dynamic-slice(%ar), dynamic_slice_sizes={22500}\n}\n"
    )
    found = play(["%all-reduce-scatter.1 = bf16[22500]{0} fusion(%x), kind=kCustom, calls=%ars"], others)
    assert [(t.kind, t.wire_bytes) for t in found.traffic] == [("reduce-scatter", 45_000)]


def test_what_crosses_slices_goes_through_the_hosts():
    meeting = (
        'frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.3_0",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    lines = [
        "%token = token[] after-all()",
        "%big = bf16[780000]{0} bitcast(%x)",  # 1,560,000 bytes: a millisecond at 1.56 GB/s
        f"%send = (bf16[780000]{{0}}, u32[], token[]) send(%big, %token), channel_id=5, {meeting}",
        f"%recv = (bf16[780000]{{0}}, u32[], token[]) recv(%token), channel_id=6, {meeting}",
        work("a", 400),
        "%sent = token[] send-done(%send), channel_id=5",
        "%got = (bf16[780000]{0}, token[]) recv-done(%recv), channel_id=6",
    ]
    found = play(lines, slices=2)
    assert found.seconds == pytest.approx(1000 * US)
    (traffic,) = found.traffic
    assert (traffic.kind, traffic.group, traffic.wire_bytes) == ("all-reduce of slices", 2, 1_560_000)
    assert traffic.exposed == pytest.approx(600 * US)
    assert not found.unknown
    assert play([line.replace("_xla_megascale", "_other") for line in lines]).unknown["collective send"] == 1


def test_an_unknown_collective_is_reported():
    found = play(["%c = bf16[8]{0} collective-shuffle(%x), channel_id=1, replica_groups={{0,1}}"])
    assert found.unknown["collective collective-shuffle"] == 1
    found = play([SYNC.replace("{{0,1}}", "pairs of neighbours")])
    assert "unknown form" in next(iter(found.unknown))


def test_copies_run_beside_and_wait_if_they_must():
    copy = "%s = (f32[204750]{0:S(1)}, f32[204750]{0}, u32[]) copy-start(%x)"  # 819,000 bytes: a microsecond
    done = "%d = f32[204750]{0:S(1)} copy-done(%s)"
    assert play([copy, work("a", 3), done]).seconds == pytest.approx(3 * US)
    found = play([copy, work("a", 0.25), done])
    assert found.seconds == pytest.approx(1 * US)
    assert found.seconds_by("part")[EXPOSED_COPIES,] == pytest.approx(0.75 * US)


def test_operations_without_an_estimate_cost_their_bytes():
    found = play(["%big = f32[204750]{0} bitcast(%x)", "%p = f32[409500]{0} pad(%big, %x), padding=0_204750"])
    # 819,000 bytes in, as many and as many again out, 16 of %x.
    assert found.seconds == pytest.approx(3 * US, rel=1e-3)
    assert list(found.seconds_by("kind")) == [("bytes",)]


def test_gathers_and_scatters_move_their_rows_and_not_the_table():
    table = "%t = f32[204750,100]{1,0} bitcast(%x)"
    found = play([table, "%g = f32[204750]{0} gather(%t, %x), offset_dims={}"])
    assert found.seconds == pytest.approx(2 * US, rel=1e-3)  # read and written, and 16 bytes of %x
    rows = "%r = f32[2047,100]{1,0} bitcast(%x)"
    found = play([table, rows, "%s = f32[204750,100]{1,0} scatter(%t, %x, %r), to_apply=%add"])
    assert found.seconds == pytest.approx(3 * US, rel=1e-2)


def test_unknown_custom_calls_are_reported_and_known_ones_are_free():
    found = play(
        [
            '%a = f32[204750]{0} custom-call(), custom_call_target="AllocateBuffer"',
            '%b = f32[8]{0} custom-call(%x), custom_call_target="Mystery"',
        ]
    )
    assert found.unknown == {"custom call Mystery": 1}
    assert found.seconds < 0.1 * US


ATTENTION = (
    "%q = bf16[2,4,1408,96]{3,2,1,0} bitcast(%x)\n  %k = bf16[2,4,1296,96]{3,2,1,0} bitcast(%x)\n"
    "  %flash_attention_forward.1 = (bf16[2,4,1408,96]{3,2,1,0}, f32[2,4,1,1408]{3,2,1,0}) custom-call(%x, %q, %k, "
    '%k), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":'
    '{"flops":"5605687296",'
    '"transcendentals":"1","bytes_accessed":"1000"}}}'
)


def test_attention_kernels_take_the_rate_of_their_schedule():
    found = play([ATTENTION])
    useful = 4 * 2 * 4 * 1296 * 1296 * 96  # the kernel's own figure is of 1,408 queries
    expected = useful / flop_per_bundle("v5e", "forward", 96, 1296) / 1.5e9
    assert found.seconds == pytest.approx(expected, rel=1e-6)
    assert list(found.seconds_by("kind")) == [("attention kernel",)]
    backward = play([ATTENTION.replace("attention_forward", "attention_backward")])
    rates = [flop_per_bundle("v5e", d, 96, 1296) for d in ("forward", "backward")]
    assert backward.seconds / found.seconds == pytest.approx(rates[0] / rates[1])


def test_splash_attention_is_causal():
    stated = ATTENTION.replace("flash_attention_forward", "splash_mha_fwd")  # tokamax's, of other pairs than computed
    silent = stated.replace('"flops":"5605687296",', "")  # JAX's
    for line in (stated, silent):
        computed = 4 * 2 * 4 * 1408 * 1296 * 96 / 2
        assert play([line]).seconds == pytest.approx(computed / flop_per_bundle("v5e", "forward", 96, 1296) / 1.5e9)


def test_attention_is_read_in_either_layout_and_at_a_given_rate():
    turned = ATTENTION.replace("1408,96]", "96,1408]").replace("1296,96]", "96,1296]")
    assert turned != ATTENTION and play([turned]).seconds == play([ATTENTION]).seconds
    asked = []

    def rate(*call):
        asked.append(call)
        return 1e5

    found = play([ATTENTION], attention_rate=rate)
    assert asked == [("v5e", "forward", 96, 1296)]
    assert found.seconds == pytest.approx(4 * 2 * 4 * 1296 * 1296 * 96 / 1e5 / 1.5e9)


def test_other_kernels_take_what_they_state():
    found = play([ATTENTION.replace("flash_attention_forward", "sample")])
    assert found.seconds == pytest.approx(5605687296 / 197e12 / 0.5)
    assert list(found.seconds_by("kind")) == [("kernel",)]
    silent = play(['%mystery = bf16[8]{0} custom-call(%x), custom_call_target="tpu_custom_call"'])
    assert silent.unknown == {"kernel without a cost estimate: mystery": 1}


def test_two_cores_work_on_an_attention_call_of_v5p():
    one = flop_per_bundle("v5p", "forward", 96, 1296) * 1.75e9
    topology_seconds = play([ATTENTION], name="v5p-8").seconds
    assert topology_seconds == pytest.approx(4 * 2 * 4 * 1296 * 1296 * 96 / (2 * one))


@pytest.mark.parametrize(
    ("scope", "part", "direction"),
    [
        ("jit(train_step)/jvp(encoder)/while/body/attention/dot_general", "encoder attention", "forward"),
        ("jit(train_step)/transpose(jvp(encoder))/while/body/mlp/dot", "encoder MLP", "backward"),
        ("jit(train_step)/jvp(encoder)/patches/dot_general", "encoder, rest", "forward"),
        (
            "jit(s)/transpose(jvp(decoder))/while/body/checkpoint/rematted_computation/attention/mul",
            "decoder attention",
            "recomputed",
        ),
        ("jit(train_step)/while/body/jvp(projector)/dot_general", "projector", "forward"),
        ("jit(train_step)/transpose(jvp(embed))/scatter-add", "embedding", "backward"),
        ("jit(train_step)/jvp(loss)/shard_map/while/body/dot_general", "loss", "forward"),
        ("jit(train_step)/optimizer/mul", "optimizer", "forward"),
        ("jit(train_step)/reduce_sum", "other", "forward"),
        ("convert.2", "other", "forward"),
    ],
)
def test_parts_by_scope(scope, part, direction):
    found = play([work("a", 1, scope=scope)])
    assert found.seconds_by("part", "direction") == {(part, direction): pytest.approx(US)}


def test_what_has_no_scope_takes_that_of_what_is_fused_into_it_or_of_the_loop():
    others = (
        "%inner (p: bf16[8]) -> bf16[8] {\n  %p = bf16[8]{0} parameter(0)\n  ROOT %m = bf16[8]{0} negate(%p), "
        'metadata={op_name="jit(s)/jvp(projector)/neg"}\n}\n'
    )
    line = f"%f = bf16[8]{{0}} fusion(%x), kind=kLoop, calls=%inner, {cycles(1)}"
    assert play([line], others).seconds_by("part") == {("projector",): pytest.approx(US)}
