"""Levels of stored codes by byte permutes, and fp16 pairs: the steps of ``table_form.py``."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from kvbits.attention.triton.kernels.layout import num_fields
from kvbits.attention.triton.kernels.outliers import FP16_MAX

TURN = tl.constexpr(6.283185307179586 / 4294967296.0)  # radians in 2**-32 of a turn


@triton.constexpr_function
def field_width(bits: Any, head_dim: Any) -> Any:
    """Channels of a field."""
    return head_dim // num_fields(bits)


@triton.constexpr_function
def lookup_code(bits: Any) -> Any:
    """PTX that turns four bytes (of each plane) into the fp16 levels of their codes.

    A selector has a code in every half byte; fields 2 i and 2 i + 1 come out of one.
    """
    outputs = 2 * num_fields(bits)
    num_planes = 3 if bits == 3 else 1
    words = 1 << (bits - 2)  # registers of high bytes, as many of low ones
    first = outputs + num_planes
    high = [f"${first + 4 * i}" for i in range(words)]
    low = [f"${first + 4 * (words + i)}" for i in range(words)]
    planes = [f"x{i}" for i in range(num_planes)]
    lines = [".reg .b32 x0, x1, x2, s, t, m, k, a, b, h, l, zero, ones;"]
    lines += [f"xor.b32 {x}, ${outputs + i}, 0x80808080;" for i, x in enumerate(planes)]
    lines += ["mov.b32 zero, 0;", "mov.b32 ones, 0xFFFFFFFF;"] if bits == 4 else []

    def choose(field, pair):
        """Levels of two fields from the selector in s, for four bytes."""
        for half in range(2):
            if bits == 4:
                lines.append("prmt.b32 k, zero, ones, m;")  # bytes of ones where a code has bit 3
            for name, table in (("h", high), ("l", low)):
                if bits == 4:
                    lines.append(f"prmt.b32 a, {table[0]}, {table[1]}, s;")
                    lines.append(f"prmt.b32 b, {table[2]}, {table[3]}, s;")
                    lines.append(f"lop3.b32 {name}, a, b, k, 0xD8;")  # k ? b : a
                else:
                    lines.append(f"prmt.b32 {name}, {table[0]}, {table[-1]}, s;")
            lines.append(f"prmt.b32 ${2 * field + half}, l, h, 0x6240;")
            lines.append(f"prmt.b32 ${2 * pair + half}, l, h, 0x7351;")
            if half == 0:
                lines.append("shr.u32 s, s, 16;")
                if bits == 4:
                    lines.append("shr.u32 m, m, 16;")

    if bits == 4:
        lines += ["and.b32 s, x0, 0x77777777;", "shr.u32 m, x0, 1;"]
        lines += ["and.b32 m, m, 0x44444444;"]
        choose(0, 1)
    for selector, fields in selectors(bits):
        lines += selector
        choose(*fields)
    return "{" + " ".join(lines) + "}"


@triton.constexpr_function
def byte_lookup_code(bits: Any, is_half: Any) -> Any:
    """PTX that turns four bytes (of each plane) into levels below 128, int8 or fp16.

    The bits of a byte are those of an fp16 number of 2**-24 for every level.

    A selector with bit 3 asks for the sign of a byte, which is zero for such levels: of the two
    halves of a 16-level table one gives the level, the other nothing.
    """
    per_field = 2 if is_half else 1
    outputs = per_field * num_fields(bits)
    num_planes = 3 if bits == 3 else 1
    table = [f"${outputs + num_planes + 4 * i}" for i in range((1 << bits) // 4)]
    lines = [".reg .b32 x0, x1, x2, s, t, u, v, p, r, zero;", "mov.b32 zero, 0;"]
    lines += [f"xor.b32 x{i}, ${outputs + i}, 0x80808080;" for i in range(num_planes)]

    def look_up(found):
        """Levels of four codes: of two fields of two bytes."""
        lines.append(f"prmt.b32 {found}, {table[0]}, {table[1 if bits > 2 else 0]}, s;")
        if bits == 4:
            lines.append(f"prmt.b32 v, {table[2]}, {table[3]}, u;")
            lines.append(f"or.b32 {found}, {found}, v;")

    def choose(field, other):
        """Two fields from the selector in s, and that of the upper levels in u."""
        look_up("p")
        lines.append("shr.u32 s, s, 16;")
        if bits == 4:
            lines.append("shr.u32 u, u, 16;")
        look_up("r")
        if not is_half:
            lines.append(f"prmt.b32 ${field}, p, r, 0x6420;")
            lines.append(f"prmt.b32 ${other}, p, r, 0x7531;")
            return
        for place, order in ((field, "0x4240"), (other, "0x4341")):
            for half, found in enumerate(("p", "r")):
                lines.append(f"prmt.b32 ${2 * place + half}, {found}, zero, {order};")

    if bits == 4:
        lines += ["mov.b32 s, x0;", "xor.b32 u, x0, 0x88888888;"]
        choose(0, 1)
    for selector, fields in selectors(bits):
        lines += selector
        choose(*fields)
    return "{" + " ".join(lines) + "}"


@triton.constexpr_function
def selectors(bits: Any) -> Any:
    """Selectors of two fields each, of 2 or 3 bits; those of 4 are the bytes themselves.

    Planes of 3 bits are in the order P0, P2, P1: channels 0, 1 | 4, 5 | 2, 3 and bits of 6 and 7.
    """
    if bits == 4:
        return []
    if bits == 2:
        upper = ["shr.u32 s, x0, 2;", "and.b32 s, s, 0x33333333;"]
        return [(["and.b32 s, x0, 0x33333333;"], (0, 2)), (upper, (1, 3))]
    found = []
    for plane, field in enumerate((0, 4, 2)):
        lines = [f"shl.b32 t, x{plane}, 1;", "and.b32 t, t, 0x70707070;"]
        lines += [f"and.b32 s, x{plane}, 0x07070707;", "or.b32 s, s, t;"]
        found.append((lines, (field, field + 1)))
    lines = ["mov.b32 s, 0;"]
    for plane, shift, mask in ((0, 6, 0x03), (2, 4, 0x04), (1, 1, 0x60), (2, 3, 0x10)):
        lines += [f"shr.u32 t, x{plane}, {shift};", f"and.b32 t, t, {mask * 0x01010101};"]
        lines.append("or.b32 s, s, t;")
    found.append((lines, (6, 7)))
    return found


@triton.constexpr_function
def lookup_constraints(bits: Any, is_half: Any, level_bytes: Any) -> Any:
    """Outputs, planes, and every word of the table four times: once for each of four bytes."""
    outputs = (2 if is_half else 1) * num_fields(bits)
    inputs = (3 if bits == 3 else 1) + 4 * ((1 << bits) * level_bytes // 4)
    return ",".join(["=&r"] * outputs + ["r"] * inputs)


@triton.constexpr_function
def kinds(is_half: Any, count: Any) -> Any:
    """So many results."""
    return (tl.float16 if is_half else tl.int8,) * count


@triton.jit
def byte_levels_of(
    b_w, b_t, LEVELS, BITS: tl.constexpr, IS_HALF: tl.constexpr, COMPILED: tl.constexpr
):
    """Fields of levels, int8 or fp16 (times 2**-24), of bytes: a tile, or three planes of 3 bits.

    LEVELS: int8, none negative; ``b_t``: the same in registers, four in one.
    """
    if COMPILED:
        return tl.inline_asm_elementwise(
            byte_lookup_code(BITS, IS_HALF),
            lookup_constraints(BITS, IS_HALF, 1),
            b_w + b_t,
            dtype=kinds(IS_HALF, num_fields(BITS)),
            is_pure=True,
            pack=4,
        )
    else:
        b_c = codes_of(b_w, BITS)
        b_f = ()
        for j in tl.static_range(num_fields(BITS)):
            b_x = tl.load(LEVELS + b_c[j])
            b_f = b_f + (b_x.to(tl.int16).to(tl.float16, bitcast=True) if IS_HALF else b_x,)
        return b_f


@triton.jit
def codes_of(b_w, BITS: tl.constexpr):
    """Codes of every field, int32, without byte permutes."""
    N: tl.constexpr = 1 << BITS
    b_c = ()
    if BITS == 3:
        b_0 = (b_w[0] ^ -128).to(tl.int32) & 0xFF
        b_2 = (b_w[1] ^ -128).to(tl.int32) & 0xFF
        b_1 = (b_w[2] ^ -128).to(tl.int32) & 0xFF
        b_c = b_c + (b_0 & 7, b_0 >> 3 & 7, b_1 & 7, b_1 >> 3 & 7, b_2 & 7, b_2 >> 3 & 7)
        b_c = b_c + (b_0 >> 6 | (b_1 >> 4 & 4), (b_2 >> 6) * 2 | b_1 >> 7)
    else:
        b_x = (b_w[0] ^ -128).to(tl.int32) & 0xFF
        for k in tl.static_range(num_fields(BITS)):
            b_c = b_c + (b_x >> (k * BITS) & (N - 1),)
    return b_c


@triton.jit
def level_of(b_c, LEVELS, N: tl.constexpr):
    """The fp16 level of every code, without byte permutes."""
    b_h = tl.load(LEVELS + b_c).to(tl.int16) << 8
    b_l = tl.load(LEVELS + N + b_c).to(tl.int16) & 0xFF
    return (b_h | b_l).to(tl.float16, bitcast=True)


@triton.jit
def table_words(LEVELS, BITS: tl.constexpr, BYTES: tl.constexpr, COMPILED: tl.constexpr):
    """A table of levels of so many bytes each in registers, ``[1, 1]`` each.

    Joined with a zero that differs by lane, as far as the compiler can see: it would keep what is
    the same for all in registers that lanes share, of which a byte permute takes no two.
    """
    p_t = LEVELS.to(tl.pointer_type(tl.int32))
    b_t = ()
    for i in tl.static_range((1 << BITS) * BYTES // 4):
        b_x = tl.load(p_t + i + tl.zeros([1, 1], tl.int32))
        if COMPILED:
            b_x = tl.inline_asm_elementwise(
                "{.reg .b32 l, e; mov.u32 l, %lanemask_lt; mov.u32 e, %lanemask_eq; "
                "and.b32 l, l, e; or.b32 $0, $1, l;}",
                "=r,r",
                [b_x],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            )
        b_t = b_t + (b_x,)
    return b_t


@triton.jit
def levels_of(b_w, b_t, LEVELS, BITS: tl.constexpr, COMPILED: tl.constexpr):
    """Fields of levels, fp16, of bytes: one tile, or three planes of 3 bits.

    LEVELS: int8, the high bytes of all levels and then the low ones; ``b_t``: the same.
    """
    N: tl.constexpr = 1 << BITS
    if COMPILED:
        return tl.inline_asm_elementwise(
            lookup_code(BITS),
            lookup_constraints(BITS, True, 2),
            b_w + b_t,
            dtype=kinds(True, num_fields(BITS)),
            is_pure=True,
            pack=4,
        )
    else:
        b_c = codes_of(b_w, BITS)
        b_f = ()
        for j in tl.static_range(num_fields(BITS)):
            b_f = b_f + (level_of(b_c[j], LEVELS, N),)
        return b_f


@triton.jit
def scaled(b_x, b_s, b_z, COMPILED: tl.constexpr):
    """``x * s + z`` of fp16 pairs."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;",
            "=r,r,r,r",
            [b_x, b_s, b_z],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        return (b_x.to(tl.float32) * b_s + b_z).to(tl.float16)


@triton.jit
def scaled_up_to(b_x, b_s, b_z, COMPILED: tl.constexpr):
    """``x * s + z`` of fp16 pairs, at most the largest number."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "{.reg .b32 t, m; mov.b32 m, 0x7BFF7BFF; fma.rn.f16x2 t, $1, $2, $3; "
            "min.f16x2 $0, t, m;}",
            "=r,r,r,r",
            [b_x, b_s, b_z],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        return tl.minimum(b_x.to(tl.float32) * b_s + b_z, FP16_MAX).to(tl.float16)


@triton.jit
def patched(b_x, b_at, b_c, b_d, COMPILED: tl.constexpr):
    """``x + d`` where ``at == c``, of fp16 pairs."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "{.reg .b32 t; set.eq.f16x2.f16x2 t, $2, $3; fma.rn.f16x2 $0, t, $4, $1;}",
            "=r,r,r,r,r",
            [b_x, b_at, b_c, b_d],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        return (b_x + tl.where(b_at == b_c, b_d, 0.0)).to(tl.float16)


@triton.constexpr_function
def turning_code(is_high: Any) -> Any:
    """PTX of one channel of turned pairs."""
    sign = "" if is_high else "neg.f16x2 t, t; "
    return "{.reg .b32 t; mul.rn.f16x2 t, $2, $4; " + sign + "fma.rn.f16x2 $0, $1, $3, t;}"


@triton.jit
def turned(b_x, b_y, b_cos, b_sin, IS_HIGH: tl.constexpr, COMPILED: tl.constexpr):
    """One channel x of pairs with y, turned by an angle; the high one is ahead of the low one.

    Channels one by one: a conversion to an operand's layout is not moved past two results.
    """
    if COMPILED:
        return tl.inline_asm_elementwise(
            turning_code(IS_HIGH),
            "=r,r,r,r,r",
            [b_x, b_y, b_cos, b_sin],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        b_t = b_y.to(tl.float32) * b_sin
        return (b_x.to(tl.float32) * b_cos + (b_t if IS_HIGH else -b_t)).to(tl.float16)


@triton.constexpr_function
def even_code(half: Any) -> Any:
    """PTX that takes one of the two bytes of a pair, without its lowest bit."""
    shift = "shr.u32 t, t, 8; " if half else ""
    return "{.reg .b32 t; mov.b32 t, $1; " + shift + "and.b32 $0, t, 0x00FE00FE;}"


@triton.jit
def even_of(b_pair, HALF: tl.constexpr, COMPILED: tl.constexpr):
    """The even number at or below one of two bytes, as the fp16 number its bits spell."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            even_code(HALF), "=r,r", [b_pair], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        return ((b_pair >> (8 * HALF)) & 0xFE).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def is_at(b_at, b_c, COMPILED: tl.constexpr):
    """1 where ``at == c``, else 0, of fp16 pairs."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "set.eq.f16x2.f16x2 $0, $1, $2;",
            "=r,r,r",
            [b_at, b_c],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        return tl.where(b_at == b_c, 1.0, 0.0).to(tl.float16)


@triton.jit
def cos_sin(b_turns, COMPILED: tl.constexpr):
    """Cosine and sine of int32 angles in 2**-32 of a turn."""
    b_x = b_turns.to(tl.float32) * TURN
    if COMPILED:
        return tl.inline_asm_elementwise(
            "cos.approx.f32 $0, $2; sin.approx.f32 $1, $2;",
            "=&f,=&f,f",
            [b_x],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        return tl.cos(b_x), tl.sin(b_x)
