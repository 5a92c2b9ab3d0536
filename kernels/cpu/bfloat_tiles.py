"""Products of bfloat16 matrices in tiles of registers, by AVX-512 BF16, and the vectors that attention makes of them.

    C[i + r, j] = sum_p A[i + r, p] . B[p, j],    r < ROWS = 6, 16 to 64 columns j

vdpbf16ps adds two products of bfloat16 to each of 16 sums of float32; an FMA of float32 adds one. A matrix is of int32
words, each a pair of neighbours in the contraction p. A may have any strides; B is (panels, pairs, 64 columns) and
contiguous. A tile of 6 x 64 is 24 registers of sums; a step of the contraction loads four vectors of B and broadcasts
six words of A, so that the arithmetic hides B's way from the second cache. It is written as LLVM IR, since sums in an
array would be kept in memory.
"""

from __future__ import annotations

import numba
from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from bigbag.kernels.cpu.vectors import _FAST, _FLOAT, _INT, _LONG, Vector, _address, _all, _splat

ROWS, COLUMNS = 6, 64
LANES = 16  # of a register


def suits(features: dict[str, bool], compiled_for: str | None = None) -> bool:
    """Whether these tiles are what a processor multiplies bfloat16 with.

    Args:
        features: what the processor has, in LLVM's words.
        compiled_for: the features that Numba is told to compile for (NUMBA_CPU_FEATURES), if any.
    """
    # A processor with AMX multiplies many times as fast with that, as PyTorch's kernels do.
    able = features.get("avx512bf16", False) and not features.get("amx-bf16", False)
    return able and (compiled_for is None or "+avx512bf16" in compiled_for)


AVAILABLE = suits(binding.get_host_cpu_features(), numba.config.CPU_FEATURES)


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite lacks."""

    def __str__(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _BFloat)

    def __hash__(self):
        return hash(_BFloat)


_SUMS, _WORDS, _PAIRS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES), ir.VectorType(_BFloat(), 2 * LANES)


def _call(builder, name, returned, *operands):
    kind = ir.FunctionType(returned, [operand.type for operand in operands])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), operands)


def _load(builder, address, kind):
    return builder.load(builder.bitcast(address, kind.as_pointer()), align=4)


def _step(builder, sums, left, stride, right):
    """Sums after one more pair of the contraction: words of A below each other at ``left``, those of B at ``right``."""
    count = len(sums) // ROWS
    columns = [builder.gep(right, [_LONG(64 * j)]) for j in range(count)]
    vectors = [builder.bitcast(_load(builder, column, _WORDS), _PAIRS) for column in columns]
    found = []
    for row in range(ROWS):
        word = _load(builder, builder.gep(left, [builder.mul(stride, _LONG(row))]), _INT)
        pair = builder.bitcast(_splat(builder, word, LANES), _PAIRS)
        for total, vector in zip(sums[row * count :], vectors):
            found.append(_call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", _SUMS, total, pair, vector))
    return found


def _strides(context, builder, kind, value):
    return cgutils.unpack_tuple(builder, context.make_array(kind)(context, builder, value).strides, kind.ndim)


def _product(context, builder, kinds, count, a, i, b, panel, first, pairs):
    """A[i : i + ROWS, :pairs] . B[panel, first : first + pairs], row by row in ``count`` registers each."""
    down, along = _strides(context, builder, kinds[0], a)
    left = _address(context, builder, kinds[0], a, [i, _LONG(0)])
    right = _address(context, builder, kinds[1], b, [panel, first, _LONG(0)])
    start = [pairs, left, right] + [_all(_SUMS, 0.0)] * (ROWS * count)
    before, loop = builder.block, builder.append_basic_block("tile")
    builder.branch(loop)
    builder.position_at_end(loop)
    state = [builder.phi(value.type) for value in start]
    missing, left, right, *sums = state
    found = _step(builder, sums, left, down, right)
    missing = builder.sub(missing, _LONG(1))
    end = [missing, builder.gep(left, [along]), builder.gep(right, [_LONG(4 * COLUMNS)]), *found]
    for phi, value, last in zip(state, start, end):
        phi.add_incoming(value, before)
        phi.add_incoming(last, loop)
    after = builder.append_basic_block("tile.end")
    builder.cbranch(builder.icmp_signed("==", missing, _LONG(0)), after, loop)
    builder.position_at_end(after)
    return found


def _tile(registers, a, b, c, change):
    """Signature and code of a product that goes to C; ``change(builder, total, pointer, factor)``: what is stored."""

    def code(context, builder, signature, args):
        count = registers.literal_value
        _, left, i, right, panel, first, pairs, out, row, column, factor = args
        found = _product(context, builder, (a, b), count, left, i, right, panel, first, pairs)
        start, (down, _) = _address(context, builder, c, out, [row, column]), _strides(context, builder, c, out)
        for k, total in enumerate(found):
            place = builder.add(builder.mul(down, _LONG(k // count)), _LONG(4 * LANES * (k % count)))
            pointer = builder.bitcast(builder.gep(start, [place]), _SUMS.as_pointer())
            builder.store(change(builder, total, pointer, factor), pointer, align=4)
        return context.get_dummy_value()

    index = types.int64
    return types.void(registers, a, index, b, index, index, index, c, index, index, types.float32), code


@intrinsic(prefer_literal=True)
def multiply(typing, registers, a, i, b, panel, first, pairs, c, row, column, factor):
    """``C[row : row + ROWS, column : ...] = factor A[i : i + ROWS, :pairs] . B[panel, first : first + pairs]``, in
    ``registers`` (a constant) of 16 columns; at least one pair."""

    def change(builder, total, pointer, factor):
        return builder.fmul(total, _splat(builder, factor, LANES))

    return _tile(registers, a, b, c, change)


@intrinsic(prefer_literal=True)
def multiply_onto(typing, registers, a, i, b, panel, first, pairs, c, row, column, factor):
    """The same, added to C."""

    def change(builder, total, pointer, factor):
        product = builder.fmul(total, _splat(builder, factor, LANES), flags=_FAST)
        return builder.fadd(builder.load(pointer, align=4), product, flags=_FAST)

    return _tile(registers, a, b, c, change)


def _by_register(builder, function, *vectors):
    """``function`` of 16 lanes at a time."""
    found = vectors[0]
    whole = f"v{found.type.count}f32"
    for first in range(0, found.type.count, LANES):
        parts = [_call(builder, f"llvm.vector.extract.v16f32.{whole}", _SUMS, v, _LONG(first)) for v in vectors]
        part = function(*parts)
        found = _call(builder, f"llvm.vector.insert.{whole}.v16f32", found.type, found, part, _LONG(first))
    return found


# 2^x on [0, 1) to 8e-8 of its value, and exact at 0: minimax.
_POWERS = (0.0018671301659196615, 0.009017029777169228, 0.05579991266131401, 0.24016444385051727, 0.6931512951850891, 1)


@intrinsic
def power_of_2(typing, value):
    """2^value of a vector of float32."""

    def code(context, builder, signature, args):
        kind, zero, everywhere, exact = args[0].type, _all(_SUMS, 0.0), ir.IntType(16)(-1), _INT(4)

        def fraction(x):
            # x - floor(x), and 0 of infinities.
            name = "llvm.x86.avx512.mask.reduce.ps.512"
            return _call(builder, name, _SUMS, x, _INT(1), zero, everywhere, exact)

        def scaled(y, x):
            # y 2^floor(x)
            return _call(builder, "llvm.x86.avx512.mask.scalef.ps.512", _SUMS, y, x, zero, everywhere, exact)

        x, y = _by_register(builder, fraction, args[0]), _all(kind, _POWERS[0])
        for factor in _POWERS[1:]:
            y = builder.fadd(builder.fmul(y, x, flags=_FAST), _all(kind, factor), flags=_FAST)
        return _by_register(builder, scaled, y, args[0])

    return value(value), code


def _lanewise(operation, one, other):
    def code(context, builder, signature, args):
        right = args[1] if isinstance(other, Vector) else _splat(builder, args[1], one.lanes)
        return getattr(builder, operation)(args[0], right)

    return one(one, other), code


@intrinsic
def add(typing, one, other):
    """``one + other``; other is a vector or a number, as of the next two."""
    return _lanewise("fadd", one, other)


@intrinsic
def subtract(typing, one, other):
    """``one - other``."""
    return _lanewise("fsub", one, other)


@intrinsic
def times(typing, one, other):
    """``one * other``."""
    return _lanewise("fmul", one, other)


def _rounded(builder, value):
    narrow = builder.fptrunc(value, ir.VectorType(_BFloat(), value.type.count))
    return builder.bitcast(narrow, ir.VectorType(ir.IntType(16), value.type.count))


@intrinsic
def rounded(typing, value):
    """A vector's numbers rounded to bfloat16, as float32."""

    def code(context, builder, signature, args):
        bits = builder.zext(_rounded(builder, args[0]), ir.VectorType(_INT, value.lanes))
        return builder.bitcast(builder.shl(bits, _all(bits.type, 16)), args[0].type)

    return value(value), code


@intrinsic
def store_rounded(typing, value, out, i, c):
    """Write a vector to ``out[i, c : c + lanes]`` as bfloat16."""

    def code(context, builder, signature, args):
        narrow = _rounded(builder, args[0])
        address = _address(context, builder, signature.args[1], args[1], args[2:])
        builder.store(narrow, builder.bitcast(address, narrow.type.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(value, out, i, c), code


@intrinsic
def store_pairs(typing, one, other, out, i, c):
    """Write two vectors to ``out[i, c : c + lanes]`` as words: pairs of bfloat16, the first one's lower."""

    def code(context, builder, signature, args):
        wide = ir.VectorType(_INT, one.lanes)
        low, high = (builder.zext(_rounded(builder, side), wide) for side in args[:2])
        words = builder.or_(low, builder.shl(high, _all(wide, 16)))
        address = _address(context, builder, signature.args[2], args[2], args[3:])
        builder.store(words, builder.bitcast(address, wide.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(one, other, out, i, c), code
