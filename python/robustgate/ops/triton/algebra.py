"""Device functions every kernel shares: exponentials, logarithms, the logits' transform, a row.

They are polynomials on float32 rather than calls of a vendor's library: the same digits on every
device and in the interpreter. The log-sum-exp is online and one exponential a column: with m the
largest value of a lane so far and t = a (x - m),

    s <- s + 2^t  where t <= 0,  else  s 2^-t + 1,   2^-|t| in both.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32: a row may hold nothing above it
FAR = tl.constexpr(20.0)  # nats between experts beyond which e^d is left for logarithms
IMPOSSIBLE = tl.constexpr(-1048576.0)  # nats or bits: a column of probability 0
MAX_ADDS = tl.constexpr(16)  # float32 additions a lane, before a sum goes to float64


@triton.jit
def exponential(d):
    """Return e^d and e^d - 1, both to 1e-7 relative, for d <= 80; from -87 down e^d is e^-87."""
    d = tl.where(d < -87.0, -87.0, d)
    shifted = d * 1.44269504 + 12583039.0  # 1.5 * 2^23 + 127: rounds, the integer in the low bits
    n = shifted - 12583039.0
    power = (shifted.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
    f = d * 1.44269504 - n
    p = f * 1.5403512e-4 + 1.3390736e-3
    p = p * f + 9.6182376e-3
    p = p * f + 5.5503574e-2
    p = p * f + 2.4022649e-1
    p = (p * f + 6.9314718e-1) * f
    return power * p + power, power * p + (power - 1.0)


@triton.jit
def log_sum(y, residual):
    """Return log(y + residual) for y > 0 and a residual of at most y's last place, to 1e-7.

    Relative, also near 1, where log1p(x) = log_sum(1 + x, x - ((1 + x) - 1)).
    """
    bits = y.to(tl.int32, bitcast=True)
    exponent = ((bits - 0x3F400000) >> 23) << 23  # y = m 2^exponent, m in [0.75, 1.5)
    m = (bits - exponent).to(tl.float32, bitcast=True)
    r = residual * (0x3F800000 - exponent).to(tl.float32, bitcast=True) + (m - 1.0)
    q = r * 5.4111741e-2 - 1.2076720e-1
    q = q * r + 1.4994498e-1
    q = q * r - 1.6824313e-1
    q = q * r + 1.9975913e-1
    q = q * r - 2.4993218e-1
    q = q * r + 3.3333594e-1
    q = q * r - 5.0000066e-1
    q = q * r * r + r
    return (exponent >> 23).to(tl.float32) * 0.693147181 + q


@triton.jit
def log1p(x):
    """Return log(1 + x) to 1e-7 relative."""
    y = 1.0 + x
    return log_sum(y, x - (y - 1.0))


@triton.jit
def tanh(y):
    """Return tanh y: the rational function of degrees 13 and 6 that Eigen and XLA use."""
    y = tl.where(y > 7.90531111, 7.90531111, tl.where(y < -7.90531111, -7.90531111, y))
    y2 = y * y
    p = y2 * -2.76076847742355e-16 + 2.00018790482477e-13
    p = p * y2 - 8.60467152213735e-11
    p = p * y2 + 5.12229709037114e-08
    p = p * y2 + 1.48572235717979e-05
    p = p * y2 + 6.37261928875436e-04
    p = p * y2 + 4.89352455891786e-03
    q = y2 * 1.19825839466702e-06 + 1.18534705686654e-04
    q = q * y2 + 2.26843463243900e-03
    q = q * y2 + 4.89352518554385e-03
    return y * p / q


# The logits' transform, z' = unit u with u = z or tanh(inner z): floats made by launch.transform.
# float64 numbers come as two float32 parts. Exponents of two are u * scale.


@triton.jit
def inner_of(transform):
    """Return 1 / softcap."""
    return transform[0]


@triton.jit
def scale_of(transform):
    """Return unit * log2(e), rounded to float32."""
    return transform[1]


@triton.jit
def unit_of(transform):
    """Return unit = softcap / temperature in float64."""
    return tl.cast(transform[2], tl.float64) + tl.cast(transform[3], tl.float64)


@triton.jit
def inverse_unit_of(transform):
    """Return 1 / unit in float64."""
    return tl.cast(transform[4], tl.float64) + tl.cast(transform[5], tl.float64)


@triton.jit
def natural(log_sum, transform):
    """Return nats in float64 for a natural logarithm of terms whose exponents `scale` rounded."""
    return log_sum + log_sum * tl.cast(transform[6], tl.float64)


@triton.jit
def inverse_temperature_of(transform):
    """Return 1 / temperature: dz'/dz without a softcap."""
    return transform[7]


@triton.jit
def to_u(z, transform, CAP: tl.constexpr):
    """Return u in float32."""
    u = z.to(tl.float32)
    if CAP:
        u = tanh(u * inner_of(transform))
    return u


@triton.jit
def row_of(z, n, inner_rows, outer, inner):
    """Return the address of row n, in two levels: [B, T, V] with any strides between rows."""
    block = n // inner_rows
    row = n - block * inner_rows
    return z + block.to(tl.int64) * outer + row.to(tl.int64) * inner


@triton.jit
def pick(values, k, K: tl.constexpr):
    """Return values[k] for a k known at run time."""
    chosen = values[0]
    for i in tl.static_range(1, K):
        chosen = tl.where(k == i, values[i], chosen)
    return chosen


@triton.jit
def online_step(top, total, x, scale):
    """Add one column a lane to the lanes' (largest value, sum relative to it)."""
    t = (x - top) * scale
    above = t > 0
    term = tl.exp2(-tl.abs(t))
    return tl.where(above, x, top), tl.where(above, total * term + 1.0, total + term)


@triton.jit
def steps_of(begin, end, BLOCK: tl.constexpr):
    """Return how many steps of BLOCK columns a float32 sum takes from ``begin``, up to MAX_ADDS.

    Loops count steps, not columns: the compiler loses a column's alignment, and with it the vector
    loads, where a loop starts at a column it does not know.
    """
    return tl.minimum(MAX_ADDS, tl.cdiv(end - begin, BLOCK))


@triton.jit
def load_row(z, columns, vocab, other, TAIL: tl.constexpr):
    """Return some columns of a row, ``other`` beyond the vocabulary.

    A mask that cuts a vector in two would make every load a scalar one: the columns beyond the last
    multiple of 16 (TAIL: there are some) come by a load of their own.
    """
    vectors = vocab
    if TAIL:
        vectors = vocab // 16 * 16
    x = tl.load(z + columns, mask=columns < vectors, other=other)
    if TAIL:
        edge = (columns >= vectors) & (columns < vocab)
        x = tl.where(edge, tl.load(z + columns, mask=edge, other=other), x)
    return x


@triton.jit
def store_row(z, columns, values, vocab, TAIL: tl.constexpr):
    """Store some columns of a row, in its dtype and in vectors like load_row."""
    vectors = vocab
    if TAIL:
        vectors = vocab // 16 * 16
    values = values.to(z.dtype.element_ty)
    tl.store(z + columns, values, mask=columns < vectors)
    if TAIL:
        tl.store(z + columns, values, mask=(columns >= vectors) & (columns < vocab))


@triton.jit
def row_max_and_sums(
    z, vocab, transform, CAP: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr
):
    """Return top of a row and sum_v 2^(scale (u_v - top)) of every lane, float32.

    A sum is NaN where the row has NaN or +inf, and all are 0 where it has nothing but -inf.
    """
    scale = scale_of(transform)
    top = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        u = to_u(load_row(z, columns, vocab, -float("inf"), TAIL), transform, CAP)
        if CAP:
            u = tl.where(columns < vocab, u, -float("inf"))
        top, total = online_step(top, total, u, scale)
    highest = tl.max(top, 0)
    return highest, total * tl.exp2((top - highest) * scale)


@triton.jit
def log_sum_exp(top, total, transform):
    """Return the row's log-sum-exp in float64 from its maximum and its sum relative to it."""
    log_total = tl.log(total.to(tl.float64))
    return top.to(tl.float64) * unit_of(transform) + natural(log_total, transform)
