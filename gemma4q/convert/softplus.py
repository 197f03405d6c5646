"""log(1 + e^x) with the last bit as torch has it, since the files of llama.cpp's converter do.

torch computes it with SLEEF's vector functions `expf` and `log1pf` of 1.0 ulp (sleef.org; Shibata and Petrogalli,
2020), which round correctly nearly always. The same polynomials are evaluated here in the same order; a product in
double is exact, so a sum in double rounds as a fused multiply-add does, but for ties too rare to meet.
"""

import numpy as np

F = np.float32
THRESHOLD, NOTHING = F(20), F(-104)  # beyond the one x itself is the answer, below the other 0
LN2 = (F(0.693145751953125), F(1.428606765330187045e-06))  # in two parts, the first with few bits
LN2_PAIR = (F(0.69314718246459960938), F(-1.904654323148236017e-09))
EXP = (0.000198527617612853646, 0.00139304355252534151, 0.00833336077630519867, 0.0416664853692054749,
       0.166666671633720398, 0.5)  # fmt: skip
LOG1P = (0.3027294874, 0.3996108174, 0.6666694880)


def softplus(x: np.ndarray) -> np.ndarray:
    """float32 -> float32."""
    x = np.asarray(x, F)
    inner = _log1p(_exp(np.clip(x, NOTHING, THRESHOLD)))
    return np.where(x > THRESHOLD, x, np.where(x < NOTHING, F(0), inner))


def softplus_half(x: np.ndarray) -> np.ndarray:
    """As torch does it for half floats: rounded to one at the end. float32 -> float32."""
    return softplus(x).astype(np.float16).astype(F)


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return (np.multiply(a, b, dtype="f8") + c).astype(F)


def _polynomial(x: np.ndarray, coefficients: tuple[float, ...]) -> np.ndarray:
    out = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        out = _fma(out, x, F(coefficient))
    return out


def _exp(x: np.ndarray) -> np.ndarray:
    """2^q e^s, where s is what q times ln 2 leaves of x."""
    q = np.rint(x * F(1 / np.log(2)))
    s = _fma(q, -LN2[1], _fma(q, -LN2[0], x))
    return np.ldexp(F(1) + _fma(s * s, _polynomial(s, EXP), s), q.astype(int))


def _log1p(x: np.ndarray) -> np.ndarray:
    """e ln 2 + 2 atanh(m / (2 + m)), where 1 + x is 2^e (1 + m); sums carry the part that rounding cut off."""
    exponent = np.frexp((x + F(1)) * F(1 / 0.75))[1] - 1
    scale = np.ldexp(F(1), -exponent)
    m = _fma(x, scale, scale - F(1))
    e = exponent.astype(F)
    high = LN2_PAIR[0] * e
    low = _fma(LN2_PAIR[1], e, _fma(LN2_PAIR[0], e, -high))
    ratio, ratio_low = _quotient(m)
    square = ratio * ratio
    high, low = _sum(high, low, ratio * F(2), ratio_low * F(2))
    high, low = _sum(high, low, square * ratio * _polynomial(square, LOG1P), F(0))
    return high + low


def _quotient(m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """m / (2 + m), and what rounding cut off."""
    below = F(2) + m
    below_low = (F(2) - below) + m
    inverse = F(1) / below
    out = m * inverse
    error = _fma(-below_low, inverse, _fma(-below, inverse, F(1)))
    return out, _fma(out, error, _fma(inverse, m, -out))


def _sum(a: np.ndarray, a_low: np.ndarray, b: np.ndarray, b_low: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    total = a + b
    return total, a - total + b + a_low + b_low
