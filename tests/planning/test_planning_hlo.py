"""The reader of scheduled programs, on pieces of what libtpu prints."""

import pytest

from stepjax.planning import hlo

# Cut down from a step on v5e: shapes with layouts, a tuple with index comments, stack frames as JAX 0.10 to 0.12 write
# them, a loop without a noted trip count, a fusion with an estimate.
LOOP = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(bf16[8,128]{1,0})->bf16[8,128]{1,0}}

FileNames
1 "/home/me/models/qwen3.py"
2 "/home/me/layers.py"

FunctionNames
1 "DecoderMLP.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=84 end_line=84 column=8 end_column=80}
2 {file_name_id=2 function_name_id=1 line=55 end_line=56 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}

%fused_computation.1 (param_0.1: bf16[8,128], param_1.1: f32[128,128]) -> bf16[8,128] {
  %param_0.1 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1.1 = f32[128,128]{1,0:T(8,128)} parameter(1)
  ROOT %convolution.1 = bf16[8,128]{1,0:T(8,128)(2,1)} convolution(%param_0.1, %param_1.1), dim_labels=bf_io->bf, \
metadata={op_name="jit(step)/jvp(decoder)/while/body/mlp/dot_general" stack_frame_id=1}
}

%body (wide.param: (s32[], bf16[8,128], f32[128,128])) -> (s32[], bf16[8,128], f32[128,128]) {
  %wide.param = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, /*index=2*/f32[128,128]{1,0:T(8,128)}) parameter(0)
  %gte.0 = s32[]{:T(128)} get-tuple-element(%wide.param), index=0
  %gte.1 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%wide.param), index=1
  %gte.2 = f32[128,128]{1,0:T(8,128)} get-tuple-element(%wide.param), index=2
  %fusion.v_ref = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} fusion(%gte.1, %gte.2), kind=kOutput, \
calls=%fused_computation.1, metadata={op_name="jit(step)/jvp(decoder)/while/body/mlp/dot_general" stack_frame_id=1}, \
backend_config={"flag_configs":[],"window_config":{"estimated_cycles":"1500","iteration_bounds":["1"]}}
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%gte.0, %one)
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[8,128]{1,0}, f32[128,128]{1,0}) tuple(%next, %fusion.v_ref, %gte.2)
}

%condition (param: (s32[], bf16[8,128], f32[128,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(36)
  %param = (s32[]{:T(128)}, bf16[8,128]{1,0}, f32[128,128]{1,0}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%param), index=0
  ROOT %lt = pred[]{:T(512)} compare(%count, %limit), direction=LT
}

ENTRY %main (x: bf16[8,128], w: f32[128,128]) -> bf16[8,128] {
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="x"}
  %w = f32[128,128]{1,0:T(8,128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %tuple.0 = (s32[]{:T(128)}, bf16[8,128]{1,0}, f32[128,128]{1,0}) tuple(%zero, %x, %w)
  %while.1 = (s32[]{:T(128)}, bf16[8,128]{1,0}, f32[128,128]{1,0}) while(%tuple.0), condition=%condition, body=%body, \
metadata={op_name="jit(step)/jvp(decoder)/while" stack_frame_id=2}
  ROOT %gte.9 = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%while.1), index=1
}
"""


@pytest.fixture(scope="module")
def program():
    return hlo.read(LOOP)


def test_computations_and_their_order(program):
    assert program.entry == "main"
    assert set(program.computations) == {"fused_computation.1", "body", "condition", "main"}
    assert [op.opcode for op in program.computations["main"]] == [
        "parameter",
        "parameter",
        "constant",
        "tuple",
        "while",
        "get-tuple-element",
    ]


def test_an_operation_with_all_that_it_says(program):
    fusion = program.operation("body", "fusion.v_ref")
    assert (fusion.opcode, fusion.operands, fusion.called) == ("fusion", ("gte.1", "gte.2"), ("fused_computation.1",))
    assert fusion.cycles == 1500
    assert fusion.op_name == "jit(step)/jvp(decoder)/while/body/mlp/dot_general"
    assert fusion.source == hlo.Source("/home/me/models/qwen3.py", 84)
    assert program.operation("body", "next").cycles is None


def test_operands_are_looked_up(program):
    read = program.operand_arrays("body", program.operation("body", "fusion.v_ref"))
    assert [(a.dtype, a.dims, a.bytes, a.in_hbm) for a in read] == [
        ("bf16", (8, 128), 2048, False),
        ("f32", (128, 128), 65536, True),
    ]


def test_shapes_of_tuples_with_comments_and_layouts():
    shape = "(s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, /*index=2*/pred[3]{0}, u32[]{:S(2)}, s4[5]{0})"
    assert [(a.dtype, a.dims, a.bytes) for a in hlo.arrays(shape)] == [
        ("s32", (), 4),
        ("bf16", (4, 8), 64),
        ("pred", (3,), 3),
        ("u32", (), 4),
        ("s4", (5,), 2),
    ]


def test_trips_from_the_condition(program):
    loop = program.operation("main", "while.1")
    assert program.loop(loop) == ("condition", "body")
    assert program.trips(loop) == 36


def test_trips_that_the_compiler_noted():
    noted = LOOP.replace("body=%body, metadata", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}, metadata')
    program = hlo.read(noted)
    assert program.trips(program.operation("main", "while.1")) == 7


def test_trips_of_a_loop_that_data_ends():
    program = hlo.read(LOOP.replace("compare(%count, %limit)", "compare(%count, %count)"))
    assert program.trips(program.operation("main", "while.1")) is None


def test_trips_where_the_comparison_was_fused():
    fused = LOOP.replace(
        "ROOT %lt = pred[]{:T(512)} compare(%count, %limit), direction=LT",
        "ROOT %lt = pred[] fusion(%count, %limit), kind=kLoop, calls=%compared",
    ).replace(
        "ENTRY %main",
        "%compared (a: s32[], b: s32[]) -> pred[] {\n  %a = s32[] parameter(0)\n  %b = s32[] parameter(1)\n"
        "  ROOT %lt.1 = pred[] compare(%a, %b), direction=LT\n}\n\nENTRY %main",
    )
    program = hlo.read(fused)
    assert program.trips(program.operation("main", "while.1")) == 36


def test_sources_in_the_metadata_itself():
    old = LOOP.replace("stack_frame_id=1}", 'source_file="/a/b.py" source_line=12}')
    assert hlo.read(old).operation("body", "fusion.v_ref").source == hlo.Source("/a/b.py", 12)


def test_an_operation_printed_over_several_lines_is_one():
    kernel = (
        '  %splash.1 = bf16[8,128]{1,0} custom-call(%fusion.v_ref), custom_call_target="tpu_custom_call", '
        'frontend_attributes={kernel_metadata={\n"xprof_metadata":"{\\"block_q\\": 1024}"\n}}, '
        'metadata={op_name="jit(step)/splash"}\n'
    )
    text = LOOP.replace("  %one = s32[]", f"{kernel}  %one = s32[]")
    found = hlo.read(text).operation("body", "splash.1")
    assert found is not None and found.op_name == "jit(step)/splash"
    assert hlo.read(text).operation("body", "one") is not None


def test_inside_looks_into_called_computations(program):
    loop = program.operation("main", "while.1")
    computation, found = program.inside(loop, lambda op: op.opcode == "convolution")
    assert (computation, found.name) == ("fused_computation.1", "convolution.1")
    assert program.inside(loop, lambda op: op.opcode == "all-gather") is None


def test_attributes_end_where_their_brackets_close():
    line = "  %ar = f32[4]{0} all-reduce(%x), channel_id=3, replica_groups={{0,1},{2,3}}, to_apply=%add, "
    line += 'metadata={op_name="a"}'
    program = hlo.read(f"HloModule m, is_scheduled=true\n\nENTRY %e (x: f32[4]) -> f32[4] {{\n{line}\n}}\n")
    operation = program.operation("e", "ar")
    assert operation.attribute("replica_groups") == "{{0,1},{2,3}}"
    assert operation.attribute("channel_id") == "3"
    assert operation.attribute("dimensions") is None
    assert operation.called == ("add",)


def test_branches_are_called():
    line = "  %c = f32[4]{0} conditional(%p, %a, %b), branch_computations={%one, %two}"
    program = hlo.read(f"HloModule m, is_scheduled=true\n\nENTRY %e (x: f32[4]) -> f32[4] {{\n{line}\n}}\n")
    assert program.operation("e", "c").called == ("one", "two")


@pytest.mark.parametrize(
    "text", ["", "HloModule m\n", "HloModule m, is_scheduled=true\n", LOOP.replace("%one = s32", "%one s32")]
)
def test_what_is_no_scheduled_program_is_refused(text):
    with pytest.raises(ValueError):
        hlo.read(text)
