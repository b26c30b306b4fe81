"""Which step shapes an engine compiles."""

import pytest

from jaxserve.batch import Bucket, Level
from jaxserve.engine.programs import WASTE, Buckets


@pytest.mark.parametrize("accelerator", [False, True])
@pytest.mark.parametrize(("most", "steps"), [(1, 1), (5, 4), (16, 1), (100, 8), (256, 1), (300, 2)])
def test_every_common_step_has_a_program_that_is_not_much_too_large(most: int, steps: int, accelerator: bool):
    buckets = Buckets(most, 2048, steps, accelerator=accelerator)
    ready, wanted = buckets.all(), set()
    for seqs in range(1, most + 1):
        for level in (Level.GREEDY, Level.DRAW, Level.SAMPLE):
            wanted |= {buckets.choose(seqs, seqs, level, 0, count) for count in (1, steps)}
            wanted.add(buckets.choose(seqs + 7, seqs, level, 0))
    for bucket in wanted:
        covers = [known for known in ready if known.covers(bucket)]
        assert min(known.seqs for known in covers) <= WASTE * bucket.seqs


def test_plain_random_sampling_has_its_own_decodes_where_branches_are_dear():
    gpu, cpu = (Buckets(64, 2048, 1, accelerator=accelerator) for accelerator in (True, False))
    assert gpu.choose(3, 3, Level.DRAW, 0) == Bucket(4, 4, Level.DRAW)
    assert cpu.choose(3, 3, Level.DRAW, 0) == cpu.choose(3, 3, Level.SAMPLE, 0)
    for buckets in (gpu, cpu):
        assert buckets.choose(9, 3, Level.DRAW, 0) == buckets.choose(9, 3, Level.SAMPLE, 0)
    assert gpu.choose(3, 3, Level.SAMPLE, 0).covers(gpu.choose(3, 3, Level.DRAW, 0))
    rare = {bucket.seqs for bucket in gpu.all() if bucket.decode_only and bucket.level is Level.SAMPLE}
    assert rare == {4, 64}


def test_nothing_is_left_to_compile_on_an_accelerator():
    """Mixed steps, and decodes that are greedy or plainly random, have their own program after the warm-up."""
    buckets = Buckets(300, 2048, 8, accelerator=True)
    ready = buckets.all()
    for seqs in (1, 4, 17, 300):
        for tokens in (seqs + 1, 700, 2048):
            for level in (Level.GREEDY, Level.DRAW, Level.SAMPLE):
                assert buckets.choose(tokens, seqs, level, 0) in ready
        for level in (Level.GREEDY, Level.DRAW):
            assert {buckets.choose(seqs, seqs, level, 0, steps) for steps in (1, 8)} <= set(ready)
    mixed = [bucket for bucket in ready if not bucket.decode_only]
    assert [bucket.level for bucket in mixed] == sorted([bucket.level for bucket in mixed], reverse=True)


@pytest.mark.parametrize(
    ("most", "steps", "accelerator"), [(1, 1, False), (5, 4, True), (256, 8, True), (1024, 1, True)]
)
def test_a_few_programs_cover_every_common_step(most: int, steps: int, accelerator: bool):
    buckets = Buckets(most, 2048, steps, accelerator=accelerator)
    few = buckets.essential()
    assert len(few) == (2 if steps == 1 else 3)
    assert few[0] == buckets.largest
    assert not few[0].decode_only
    assert all(any(known.covers(bucket) for known in few) for bucket in buckets.all())


def test_large_decodes_have_sizes_between_the_powers_of_two_on_accelerators():
    for most, sizes in ((128, [64, 128]), (256, [128, 192, 256]), (300, [192, 256, 300]), (512, [256, 384, 512])):
        buckets = Buckets(most, 2048, 1, accelerator=True)
        found = sorted({bucket.seqs for bucket in buckets.all() if bucket.decode_only and bucket.level is Level.GREEDY})
        assert found[-len(sizes) :] == sizes
        if most > 128:
            assert buckets.choose(129, 129, Level.DRAW, 0).seqs == 192
    cpu = Buckets(256, 2048, 1, accelerator=False)
    assert cpu.choose(129, 129, Level.GREEDY, 0).seqs == 256
