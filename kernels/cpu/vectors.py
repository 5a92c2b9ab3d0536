"""Vectors of a fixed number of lanes in Numba, for kernels whose sums must stay in registers.

    acc = broadcast(zero, 64)                               # 64 lanes of the type of ``zero``
    while fits(acc, c, x.shape[2]):
        acc = multiply_add(acc, u, load(acc, x, i, h, c))   # acc + u * x[i, h, c : c + 64]
        store(acc, out, i, h, c)
        c += lanes(acc)

Numba leaves vectorising to LLVM, which guards every loop over several rows with tests that they do not overlap, and
keeps sums in memory. These functions are LLVM's own vector operations; it cuts them to what the machine has (64 lanes
of float32 are four registers of AVX-512, eight of AVX2, sixteen of NEON). A kernel is compiled for the lanes of the
vector among its arguments; a vector of one lane is a number. A ``tail`` is a vector for what is left of a row: it fits
where one of its lanes does; lanes past the row's end load zeros and store nothing. Loads widen what is stored narrower,
stores round to nearest even: int16 stands for bfloat16, uint16 for float16.
"""

from __future__ import annotations

from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, register_model

LINE_BYTES = 64
# Lanes of a sum that is kept in registers: as many as hide the latency of an addition, and as there are to spare.
WIDE = 128 if binding.get_host_cpu_features().get("avx512f") else 64
# And of what is left: one register of AVX-512.
NARROW = 16
_REGISTER_BYTES = 64 if binding.get_host_cpu_features().get("avx512f") else 32
_FAST = ("reassoc", "contract", "nsz")
_DOUBLE, _FLOAT, _HALF = ir.DoubleType(), ir.FloatType(), ir.HalfType()
_BYTE, _INT, _LONG = ir.IntType(8), ir.IntType(32), ir.IntType(64)


class Vector(types.Type):
    """``lanes`` numbers of ``dtype``, float32 or float64; ``tail``: its end may lie past that of a row."""

    def __init__(self, dtype, lanes, tail=False):
        self.dtype, self.lanes, self.tail = dtype, lanes, tail
        super().__init__(name=f"{'Tail' if tail else 'Vector'}({dtype}, {lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, ir.VectorType(_DOUBLE if kind.dtype == types.float64 else _FLOAT, kind.lanes))


def _all(vector, value):
    """A constant, ``value`` in each lane."""
    return ir.Constant(vector, [value] * vector.count)


def _splat(builder, value, lanes):
    first = builder.insert_element(ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined), value, _INT(0))
    return builder.shuffle_vector(first, first, _all(ir.VectorType(_INT, lanes), 0))


def _address(context, builder, kind, value, indices):
    """Address of ``array[indices]`` in bytes; an index widens before it is multiplied."""
    array = context.make_array(kind)(context, builder, value)
    address = builder.bitcast(array.data, _BYTE.as_pointer())
    for index, stride in zip(indices, cgutils.unpack_tuple(builder, array.strides, kind.ndim)):
        address = builder.gep(address, [builder.mul(builder.sext(index, _LONG), stride)])
    return address


def _stored(kind, lanes):
    """What lies in an array of ``kind``, as a vector."""
    element = {types.int16: ir.IntType(16), types.uint16: _HALF, types.float64: _DOUBLE}.get(kind.dtype, _FLOAT)
    return ir.VectorType(element, lanes)


def _bits(vector):
    """The vector as integers where it is of 16 bits, which masked instructions take."""
    return ir.VectorType(ir.IntType(16), vector.count) if vector.element == _HALF else vector


def _inside(context, builder, kind, array, column, lanes):
    """Which lanes from ``column`` on lie within a row."""
    width = cgutils.unpack_tuple(builder, context.make_array(kind)(context, builder, array).shape, kind.ndim)[-1]
    left = builder.trunc(builder.sub(width, builder.sext(column, _LONG)), _INT)
    numbers = ir.Constant(ir.VectorType(_INT, lanes), list(range(lanes)))
    return builder.icmp_signed("<", numbers, _splat(builder, left, lanes))


def _masked(builder, operation, vector, returned, *operands):
    """Call LLVM's masked load or store of a vector; the pointer's address space is part of the name."""
    element = {ir.IntType(16): "i16", _FLOAT: "f32", _DOUBLE: "f64"}[vector.element]
    name = f"llvm.masked.{operation}.v{vector.count}{element}.p0"
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(returned, [operand.type for operand in operands]), name
    )
    return builder.call(function, operands)


def _widened(builder, value, kind, dtype):
    """What was loaded from an array of ``kind`` as numbers of ``dtype``."""
    lanes = value.type.count
    if kind.dtype == types.int16:
        bits = ir.VectorType(_INT, lanes)
        value = builder.bitcast(builder.shl(builder.zext(value, bits), _all(bits, 16)), ir.VectorType(_FLOAT, lanes))
    wide = ir.VectorType(_DOUBLE if dtype == types.float64 else _FLOAT, lanes)
    return value if value.type == wide else builder.fpext(value, wide)


def _narrowed(builder, value, kind):
    if kind.dtype == types.int16:
        wide = ir.VectorType(_INT, value.type.count)
        bits = builder.bitcast(value, wide)
        last = builder.and_(builder.lshr(bits, _all(wide, 16)), _all(wide, 1))
        rounded = builder.add(builder.add(bits, _all(wide, 0x7FFF)), last)
        chosen = builder.select(builder.fcmp_unordered("uno", value, value), _all(wide, 0x7FC00000), rounded)
        return builder.trunc(builder.lshr(chosen, _all(wide, 16)), ir.VectorType(ir.IntType(16), wide.count))
    return builder.fptrunc(value, ir.VectorType(_HALF, value.type.count)) if kind.dtype == types.uint16 else value


def _splat_as(kind, *others):
    """Signature, with what arguments there are besides the value, and code of a vector that has it in each lane."""

    def code(context, builder, signature, args):
        return _splat(builder, args[0], kind.lanes)

    return kind(kind.dtype, *others), code


@intrinsic(prefer_literal=True)
def broadcast(typing, value, lanes):
    """A vector of ``lanes`` (a constant), ``value`` in each."""
    return _splat_as(Vector(types.unliteral(value), lanes.literal_value), lanes)


@intrinsic(prefer_literal=True)
def tail(typing, value, lanes):
    """The same for what is left of a row."""
    return _splat_as(Vector(types.unliteral(value), lanes.literal_value, tail=True), lanes)


@intrinsic
def in_order(typing, value):
    """A vector of four registers, ``value`` in each lane, for rows that come from memory from end to end.

    LLVM loads wider ones in part from their end backwards. To the prefetchers that is no stream, and takes twice as
    long.
    """
    return _splat_as(Vector(value, 4 * _REGISTER_BYTES // (value.bitwidth // 8)))


@intrinsic
def repeat(typing, like, value):
    """The lanes of ``value`` over and over, as many as ``like`` has."""

    def code(context, builder, signature, args):
        picked = [lane % value.lanes for lane in range(like.lanes)]
        mask = ir.Constant(ir.VectorType(_INT, like.lanes), picked)
        return builder.shuffle_vector(args[1], args[1], mask)

    return like(like, value), code


@intrinsic
def fits(typing, value, c, width):
    """Whether a vector at column c is within ``width``; a tail, whether its first lane is."""

    def code(context, builder, signature, args):
        start, end = (builder.sext(arg, _LONG) if arg.type != _LONG else arg for arg in args[1:])
        return builder.icmp_signed("<=", builder.add(start, _LONG(1 if value.tail else value.lanes)), end)

    return types.boolean(value, c, width), code


@intrinsic
def lanes(typing, value):
    """The number of lanes, a constant."""
    return types.int64(value), lambda context, builder, signature, args: _LONG(value.lanes)


@intrinsic
def load(typing, like, x, i, h, c):
    """``x[i, h, c : c + lanes]`` as a vector of the kind of ``like``; the last dimension is contiguous."""

    def code(context, builder, signature, args):
        kind = signature.args[1]
        vector, align = _stored(kind, like.lanes), kind.dtype.bitwidth // 8
        address = _address(context, builder, kind, args[1], args[2:])
        if not like.tail:
            found = builder.load(builder.bitcast(address, vector.as_pointer()), align=align)
            return _widened(builder, found, kind, like.dtype)
        whole = _bits(vector)
        mask = _inside(context, builder, kind, args[1], args[4], like.lanes)
        pointer = builder.bitcast(address, whole.as_pointer())
        found = _masked(builder, "load", whole, whole, pointer, _INT(align), mask, _all(whole, 0))
        return _widened(builder, builder.bitcast(found, vector), kind, like.dtype)

    return like(like, x, i, h, c), code


def _store_as(streamed):
    def typed(typing, value, out, i, h, c):
        def code(context, builder, signature, args):
            kind = signature.args[1]
            narrow = _narrowed(builder, args[0], kind)
            address = _address(context, builder, kind, args[1], args[2:])
            pointer = builder.bitcast(address, narrow.type.as_pointer())
            if value.tail:
                whole = builder.bitcast(narrow, _bits(narrow.type))
                mask = _inside(context, builder, kind, args[1], args[4], value.lanes)
                pointer = builder.bitcast(address, whole.type.as_pointer())
                align = _INT(kind.dtype.bitwidth // 8)
                _masked(builder, "store", whole.type, ir.VoidType(), whole, pointer, align, mask)
            elif streamed:
                # Blocks smaller than a line begin at multiples of their own size.
                size = value.lanes * kind.dtype.bitwidth // 8
                stored = builder.store(narrow, pointer, align=min(LINE_BYTES, size))
                stored.set_metadata("nontemporal", builder.module.add_metadata([_INT(1)]))
            else:
                builder.store(narrow, pointer, align=kind.dtype.bitwidth // 8)
            return context.get_dummy_value()

        return types.void(value, out, i, h, c), code

    return typed


@intrinsic
def store(typing, value, out, i, h, c):
    """Write a vector to ``out[i, h, c : c + lanes]``."""
    return _store_as(False)(typing, value, out, i, h, c)


@intrinsic
def stream(typing, value, out, i, h, c):
    """The same past the caches, for rows that nobody reads soon; they must begin at multiples of 64 bytes."""
    return _store_as(True)(typing, value, out, i, h, c)


@intrinsic
def multiply_add(typing, acc, u, v):
    """``acc + u * v``; u is a vector or a number."""

    def code(context, builder, signature, args):
        total, factor, value = args
        if not isinstance(u, Vector):
            factor = _splat(builder, context.cast(builder, factor, u, acc.dtype), acc.lanes)
        return builder.fadd(total, builder.fmul(factor, value, flags=_FAST), flags=_FAST)

    return acc(acc, u, v), code


@intrinsic
def lane_sum(typing, value):
    """The sum of all lanes."""

    def code(context, builder, signature, args):
        element, lanes = args[0].type.element, value.lanes
        name = f"llvm.vector.reduce.fadd.v{lanes}f{32 if element == _FLOAT else 64}"
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(element, [element, args[0].type]), name
        )
        return builder.call(function, [element(-0.0), args[0]], fastmath=_FAST)

    return value.dtype(value), code


@intrinsic
def larger(typing, one, other):
    """The larger number of each lane."""

    def code(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered(">", args[0], args[1]), args[0], args[1])

    return one(one, other), code


@intrinsic
def lane_maximum(typing, value):
    """The largest lane."""

    def code(context, builder, signature, args):
        element = args[0].type.element
        name = f"llvm.vector.reduce.fmax.v{value.lanes}f{32 if element == _FLOAT else 64}"
        kind = ir.FunctionType(element, [args[0].type])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [args[0]])

    return value.dtype(value), code


@intrinsic
def multiply_fold(typing, acc, u, v):
    """``acc + u * v``, the lanes of the product added up to as many as ``acc`` has; zeros fill what it lacks."""

    def code(context, builder, signature, args):
        total = args[0]
        for first in range(0, u.lanes, acc.lanes):
            # An index past the end takes a zero.
            picked = ir.Constant(ir.VectorType(_INT, acc.lanes), [min(first + k, u.lanes) for k in range(acc.lanes)])
            left, right = (builder.shuffle_vector(side, _all(side.type, 0.0), picked) for side in args[1:])
            total = builder.fadd(total, builder.fmul(left, right, flags=_FAST), flags=_FAST)
        return total

    return acc(acc, u, v), code


@intrinsic
def prefetch(typing, like, x, i, h, c):
    """Ask for the lines of ``load(like, x, i, h, c)``."""

    def code(context, builder, signature, args):
        kind = signature.args[1]
        start = _address(context, builder, kind, args[1], args[2:])
        shape = ir.FunctionType(ir.VoidType(), [start.type, _INT, _INT, _INT])
        fetch = cgutils.get_or_insert_function(builder.module, shape, "llvm.prefetch")
        for line in range(0, like.lanes * kind.dtype.bitwidth // 8, LINE_BYTES):
            builder.call(fetch, [builder.gep(start, [_LONG(line)]), _INT(0), _INT(3), _INT(1)])
        return context.get_dummy_value()

    return types.void(like, x, i, h, c), code


@intrinsic
def fence(typing):
    """After it, other threads see what :func:`stream` wrote."""

    def code(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), code
