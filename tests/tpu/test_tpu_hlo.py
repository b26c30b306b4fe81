"""What an optimized HLO text says about memory traffic."""

import pytest

from jaxserve.engine.hlo import Program

TEXT = """HloModule jit_step, is_scheduled=true

%fused (param_0: bf16[1000,128], param_1: s32[8]) -> bf16[8,128] {
  %param_0 = bf16[1000,128]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = s32[8]{0:T(128)} parameter(1)
  ROOT %gather = bf16[8,128]{1,0:T(8,128)(2,1)} gather(%param_0, %param_1), offset_dims={1}
}

%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %y = bf16[8,128]{1,0:T(8,128)(2,1)} negate(%x)
  ROOT %t = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%x, %y)
}

ENTRY %main (table: bf16[1000,128], ids: s32[8], cache: bf16[64,128], w: bf16[128,128]) -> bf16[8,128] {
  %table = bf16[1000,128]{1,0:T(8,128)(2,1)} parameter(0)
  %ids = s32[8]{0:T(128)} parameter(1)
  %cache = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(2)
  %w = bf16[128,128]{1,0:T(8,128)(2,1)} parameter(3)
  %fetch = (bf16[128,128]{1,0:T(8,128)(2,1)S(1)}, bf16[128,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%w)
  %rows = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} fusion(%table, %ids), kind=kCustom, calls=%fused
  %near = bf16[128,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%fetch)
  %product = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} dot(%rows, %near), lhs_contracting_dims={1}
  %sum = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} all-reduce(%product), channel_id=1
  %write = bf16[64,128]{1,0:T(8,128)(2,1)} custom-call(%sum, %cache), output_to_operand_aliasing={{}: (1, {})}
  %attend = bf16[8,128]{1,0:T(8,128)(2,1)} custom-call(%write), metadata={op_name="jit(step)/paged_attention/call"}, \
backend_config={"custom_call_config":{"cost_estimate":{"flops":"70","bytes_accessed":"900"}}}
  %start = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%ids, %attend)
  %loop = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) while(%start), body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %copy = bf16[64,128]{1,0:T(8,128)(2,1)} copy(%cache)
  ROOT %out = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""
ROW = 8 * 128 * 2
FETCH, IDS, LOOP, COPY = 128 * 128 * 2, 32, 3 * 2 * ROW, 2 * 64 * 128 * 2


def test_bytes_that_cross_the_border_count_once():
    traffic = Program.parse(TEXT).traffic()
    assert traffic.hbm_bytes == FETCH + ROW + IDS + 900 + LOOP + COPY  # the gather reads rows, the write is in place
    assert traffic.collectives == [("all-reduce", ROW)]
    assert traffic.kernels == [("", 0, 0), ("jit(step)/paged_attention/call", 70, 900)]


def test_scopes_can_be_left_out():
    program = Program.parse(TEXT)
    assert program.traffic().hbm_bytes - program.traffic(without="paged_attention").hbm_bytes == 900


def test_copies_inside_the_memory_are_found():
    program = Program.parse(TEXT)
    assert [line.name for line in program.copies(1)] == ["copy"]  # not the fetch, which leaves it
    assert list(program.copies(1 << 20)) == []


def test_what_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        Program.parse("HloModule nothing")
