"""The nonlinearities of the paper's network in a kernel, and tanh by as few instructions as its precision allows.

U hidden units of one lane, L lane.
"""

import triton
import triton.language as tl

from kernels import two_layer

SLOPE = tl.constexpr(two_layer.SLOPE)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
ROUND = tl.constexpr(1.5 * 2.0**52)  # adding it rounds a double to an integer, kept in its low bits
SIGN = tl.constexpr(-(2**63))
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def activation(z, NONLINEARITY: tl.constexpr):
    """phi of z / sqrt(n), where z is the product of inputs and weights."""
    if NONLINEARITY == "tanh":
        if z.dtype == tl.float64:
            return _tanh_64(z)
        else:
            return _tanh_32(z)
    elif NONLINEARITY == "relu":
        return tl.where(z <= 0, 0.0, z) * SLOPE  # NaN stays NaN
    else:
        return z * 0.25


@triton.jit
def slope(a, upstream, NONLINEARITY: tl.constexpr):
    """upstream times the derivative of phi, up to the constant factor that the rate carries."""
    if NONLINEARITY == "tanh":
        return upstream * tl.fma(-a, a, 1.0)
    elif NONLINEARITY == "relu":
        return tl.where(a > 0, upstream, 0.0)
    else:
        return upstream


@triton.jit
def _tanh_32(z):
    """tanh(u), u = SLOPE z, as 1 - 2 / (e^2u + 1) on the special function unit.

    That cancels near 0: below |u| = 0.4 an odd polynomial of degree 7 (Chebyshev) takes its place.
    """
    e = _exp2_32(z * (2 * LOG2_E * SLOPE))
    large = tl.fma(_reciprocal_32(e + 1.0), -2.0, 1.0)
    x = z * z
    p = tl.fma(x, -3.28344389623282e-05, 0.0007331191588491957)
    p = tl.fma(x, p, -0.014730517535542543)
    p = tl.fma(x, p, 0.3535533557143849)
    return tl.where(tl.abs(z) < 0.4 / SLOPE, z * p, large)


@triton.jit
def _tanh_64(z):
    """tanh(SLOPE z) = m / (m + 2), m = e^t - 1, t = 2 SLOPE |z|.

    t = k ln 2 + f; expm1(f) is a polynomial of degree 11 (Chebyshev, relative error 4e-17), and
    m = 2^k expm1(f) + (2^k - 1) keeps the relative precision near 0.
    """
    t = tl.abs(z) * (2 * SLOPE)
    t = tl.where(t > 40.0, 40.0, t)  # tanh is 1 from 19.1 on; NaN stays NaN
    k = _multiply_add(t, LOG2_E, ROUND)
    f = tl.fma(k - ROUND, _double(-LN_2), t)
    # pairs, then pairs of pairs (Estrin): a short chain of dependent operations
    f2 = f * f
    f4 = f2 * f2
    p01 = _multiply_add(f, 0.16666666666666669, 0.5)
    p23 = _multiply_add(f, 0.008333333333330062, 0.04166666666662413)
    p45 = _multiply_add(f, 0.00019841269863053618, 0.0013888888917213717)
    p67 = _multiply_add(f, 2.7557268459997064e-06, 2.4801521295954376e-05)
    p89 = _multiply_add(f, 2.510038549551032e-08, 2.7620088445409746e-07)
    p03 = tl.fma(f2, p23, p01)
    p49 = tl.fma(f4, p89, tl.fma(f2, p67, p45))
    p = tl.fma(f2, tl.fma(f4, p49, p03), f)
    power = ((k.to(tl.int64, bitcast=True) + 1023) << 52).to(tl.float64, bitcast=True)
    m = tl.fma(power, p, power - 1.0)
    a = m * _reciprocal_64(m + 2.0)
    return (a.to(tl.int64, bitcast=True) | (z.to(tl.int64, bitcast=True) & SIGN)).to(tl.float64, bitcast=True)


@triton.jit
def _double(value: tl.constexpr):
    """A float64 constant: a plain number given to tl.fma would be rounded to float32."""
    return tl.full([], value, tl.float64)


@triton.jit
def _multiply_add(x, factor: tl.constexpr, term: tl.constexpr):
    """x * factor + term with float64 constants, rounded once."""
    return tl.fma(x, _double(factor), _double(term))


# The interpreter knows no PTX: there the same functions come from numpy.


@triton.jit
def _exp2_32(x):
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _reciprocal_32(x):
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _reciprocal_64(x):
    """1 / x for normal x: 20 bits from the special function unit, then one cubic Newton step."""
    if INTERPRETED:
        return 1.0 / x
    else:
        r = tl.inline_asm_elementwise("rcp.approx.ftz.f64 $0, $1;", "=d,d", [x], tl.float64, is_pure=True, pack=1)
        e = tl.fma(-x, r, 1.0)
        return tl.fma(r, tl.fma(e, e, e), r)
