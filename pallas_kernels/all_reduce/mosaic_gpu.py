"""One-shot all-reduce among the GPUs of one process, in Pallas Mosaic GPU: every device writes its part to all.

A block of threads has the same row of the array on every device. It stores the row in its place in the mailbox of each
device, over NVLink, waits for the rows of the others in its own mailbox, and adds them up. So a sum costs one trip over
the link, and one kernel that CUDA graphs hold like any other.

Every word travels with a flag beside it, in one store, as in NCCL's protocol LL: twice the bytes, but no fence and no
second trip for a flag. The flag is the number of the sum, and nothing is ever reset. Sums alternate between two halves
of the mailbox: when a device begins sum `n + 2`, it has rows of `n + 1` from all, which they send after they have
finished with `n`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, memref, scf, vector
from jaxtyping import Array, Float, Int

from pallas_kernels.all_reduce.mailbox import (
    FIRST_ADDRESS,
    MAX_ROWS,
    OWN_ADDRESS,
    PAIR_BYTES,
    PAIRS,
    ROW_BYTES,
    THREADS,
    WORDS,
)  # fmt: skip
from pallas_kernels.platform import require_hopper


def all_reduce(
    x: Float[Array, "T D"],
    mailboxes: Int[Array, "words"] | None,
    number: Int[Array, "1"] | None,
    offset: int | Int[Array, ""],
    *,
    axis: str,
) -> Float[Array, "T D"]:
    """See `pallas_kernels.all_reduce.all_reduce`."""
    require_hopper()
    if mailboxes is None or number is None:
        raise NotImplementedError("the devices have given one another no memory")
    check(x)
    return call(x, mailboxes, number, offset, ranks=lax.axis_size(axis))


def check(x: Array) -> None:
    """Raise `NotImplementedError`, naming the values, for what the kernel does not serve."""
    size = x.size * x.dtype.itemsize
    if x.dtype not in (jnp.bfloat16, jnp.float16) or size % ROW_BYTES or size > MAX_ROWS * ROW_BYTES:
        raise NotImplementedError(
            f"{x.size} elements of {x.dtype}; it adds 16-bit floats in up to {MAX_ROWS} whole rows of {ROW_BYTES} bytes"
        )


def call(
    x: Float[Array, "T D"], mailboxes: Int[Array, "words"], number: Int[Array, "1"], offset: Array | int, *, ranks: int
) -> Float[Array, "T D"]:
    """The kernel without its checks, for this many devices."""
    width = ROW_BYTES // x.dtype.itemsize
    rows = x.size // width

    def one_shot_all_reduce(*refs):
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))(partial(exchange, ranks=ranks))(*refs)

    kernel = plgpu.kernel(
        one_shot_all_reduce,
        out_type=jax.ShapeDtypeStruct((rows, width), x.dtype),
        grid=(rows,),
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    offset = jnp.asarray(offset, jnp.int32).reshape(1)
    return kernel(x.reshape(rows, width), mailboxes, number, offset).reshape(x.shape)


@dataclass(frozen=True)
class Post:
    """Where things go in the mailboxes: values of the kernel, not of Python.

    Attributes:
        count: number of this sum, from 1, since flags start as 0.
        me: this device's rank.
        own, boxes: addresses of its own mailbox and of everyone's.
    """

    ranks: int
    count: Any
    me: Any
    own: Any
    boxes: tuple[Any, ...]

    @classmethod
    def read(cls, table: Any, number: Any, offset: Any, ranks: int) -> "Post":
        """From the refs of `call`'s arguments."""
        count = arith.addi(arith.addi(_word(number, 0), _word(offset, 0)), _i32(1))
        boxes = tuple(_address(table, FIRST_ADDRESS + 2 * rank) for rank in range(ranks))
        return cls(ranks, count, _word(table, 0), _address(table, OWN_ADDRESS), boxes)

    def place(self, box: Any, rank: Any, row: Any, pair: int) -> Any:
        """A pointer to this thread's `pair` in `mailbox[count % 2, rank, row]`."""
        index = arith.andi(self.count, _i32(1))
        parts = (self.ranks, rank), (MAX_ROWS, arith.index_cast(_int(32), row)), (THREADS, mgpu.utils.thread_idx())
        for size, i in (*parts, (PAIRS, _i32(pair))):
            index = arith.addi(arith.muli(index, _i32(size)), i)
        offset = arith.extui(_int(64), arith.muli(index, _i32(PAIR_BYTES)))
        return llvm.inttoptr(llvm.PointerType.get(), arith.addi(box, offset))

    def send(self, row: Any, words: list[Any]) -> None:
        """Store this thread's words of a row in all mailboxes, each with the number of the sum beside it."""
        for box in self.boxes:
            for k in range(PAIRS):
                values = words[2 * k], self.count, words[2 * k + 1], self.count
                code = "st.volatile.global.v4.u32 [$0], {$1, $2, $3, $4};"
                mgpu.utils.inline_ptx(code, self.place(box, self.me, row, k), *values, has_side_effects=True)

    def receive(self, row: Any, rank: int) -> list[Any]:
        """What that rank sent for this thread, as soon as it is there."""
        pairs = [_await(self.place(self.own, _i32(rank), row, k), self.count) for k in range(PAIRS)]
        return [word for pair in pairs for word in (pair[0], pair[2])]


def exchange(_: Any, x: Any, table: Any, number: Any, offset: Any, y: Any, *, ranks: int) -> None:
    """The kernel's code, below Pallas, which has no pointers: refs of `call`'s arguments and its result."""
    kind = ir.MemRefType(x.type)
    post = Post.read(table, number, offset, ranks)
    row = gpu.block_id(gpu.Dimension.x)
    part = mgpu.FragmentedArray.load_strided(mgpu.utils.memref_slice(x, row), vec_size=kind.shape[1] // THREADS)
    [register] = part.registers
    words = mgpu.utils.bitcast(register, ir.VectorType.get((WORDS,), _int(32)))
    post.send(row, [vector.extract(words, [], [k]) for k in range(WORDS)])
    total = None
    for rank in range(ranks):  # in order of rank, so that all devices get the same sum
        words = vector.from_elements(words.type, post.receive(row, rank))
        registers = np.array([mgpu.utils.bitcast(words, register.type)], dtype=object)
        found = mgpu.FragmentedArray(_registers=registers, _layout=part.layout, _is_signed=None)
        found = found.astype(ir.F32Type.get())
        total = found if total is None else total + found
    assert total is not None
    total.astype(kind.element_type).store_untiled(mgpu.utils.memref_slice(y, row))


def _await(place: Any, count: Any) -> list[Any]:
    """Load a pair from there until both of its flags hold this number."""
    kinds = [_int(32)] * 4
    loop = scf.WhileOp(kinds, [])
    with ir.InsertionPoint(loop.before.blocks.append()):
        code = "ld.volatile.global.v4.u32 {$0, $1, $2, $3}, [$4];"
        found = mgpu.utils.inline_ptx(code, place, result_types=kinds, has_side_effects=True)
        first, second = (arith.cmpi(arith.CmpIPredicate.ne, found[i], count) for i in (1, 3))
        scf.condition(arith.ori(first, second), found)
    with ir.InsertionPoint(loop.after.blocks.append(*kinds)):
        scf.yield_([])
    return list(loop.results)


def _int(bits: int) -> Any:
    return ir.IntegerType.get_signless(bits)


def _i32(value: int) -> Any:
    return mgpu.utils.c(value, _int(32))


def _index(value: int) -> Any:
    return mgpu.utils.c(value, ir.IndexType.get())


def _word(ref: Any, i: int) -> Any:
    return memref.load(ref, [_index(i)])


def _address(table: Any, word: int) -> Any:
    """The address whose two words begin there."""
    low, high = (arith.extui(_int(64), _word(table, word + i)) for i in range(2))
    return arith.ori(low, arith.shli(high, mgpu.utils.c(32, _int(64))))
