"""Blocks of 256 values whose groups of 16 or 32 have small integer scales under one half float: K formats and IQ4_XS.

Owns unpack(blocks [n]) -> (q int8 [n, 256], scale [n, groups], minimum [n, groups] or None), exact, and
pack(x [n, 256], blocks [n] of zeros), which rounds to nearest without searching for better scales. Leaves checks to
`quants`.
"""

import numpy as np

from .bits import IQ4, furthest, gather, inverse, nearest, spread


def scaled(d: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """float32 [n, groups]: the block's half float times the groups' integers; products of infinity and 0 are NaN."""
    with np.errstate(invalid="ignore"):
        return d.astype("f4")[:, None] * codes.astype("f4")


def negated(d: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return -scaled(d, codes)


def unpack_q2_k(b):
    q = spread(b["qs"], 32, 2).view("i1")
    return q, scaled(b["d"], b["scales"] & 15), negated(b["dmin"], b["scales"] >> 4)


def unpack_q3_k(b):
    low, high = b["scales"][:, :8], b["scales"][:, 8:]
    scales = (spread(low, 8, 4) | spread(high, 4, 2) << 4).view("i1") - np.int8(32)
    q = (spread(b["qs"], 32, 2) | spread(b["hmask"], 32, 1) << 2).view("i1") - np.int8(4)
    return q, scaled(b["d"], scales), None


def sixes(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Twelve bytes of Q4_K and Q5_K -> 8 scales and 8 minima of six bits."""
    first, second, rest = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, (rest & 15) | (first >> 6) << 4], axis=1)
    minima = np.concatenate([second & 63, (rest >> 4) | (second >> 6) << 4], axis=1)
    return scales, minima


def twelve(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """The inverse of `sixes`."""
    first = scales[:, :4] | scales[:, 4:] >> 4 << 6
    second = minima[:, :4] | minima[:, 4:] >> 4 << 6
    rest = scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4
    return np.concatenate([first, second, rest], axis=1)


def unpack_q4_k(b):
    scales, minima = sixes(b["scales"])
    return spread(b["qs"], 32, 4).view("i1"), scaled(b["d"], scales), negated(b["dmin"], minima)


def unpack_q5_k(b):
    scales, minima = sixes(b["scales"])
    q = (spread(b["qs"], 32, 4) | spread(b["qh"], 32, 1) << 4).view("i1")
    return q, scaled(b["d"], scales), negated(b["dmin"], minima)


def unpack_q6_k(b):
    q = (spread(b["ql"], 64, 4) | spread(b["qh"], 32, 2) << 4).view("i1") - np.int8(32)
    return q, scaled(b["d"], b["scales"]), None


def unpack_iq4_xs(b):
    high = b["scales_h"].astype("<u2")[:, None].view("u1")
    scales = (spread(b["scales_l"], 1, 4) | spread(high, 1, 2) << 4).view("i1") - np.int8(32)
    return IQ4[spread(b["qs"], 16, 4)], scaled(b["d"], scales), None


# -- Packing ----------------------------------------------------------------------------------------------------------


def rounded(x: np.ndarray, low: int, high: int) -> np.ndarray:
    return np.rint(x).clip(low, high).astype("i1")


def super_scale(wanted: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales wanted by the groups [n, groups] -> half floats [n] and integers of at most `most` either way."""
    d = (np.abs(wanted).max(axis=1) / np.float32(most)).astype("f2")
    return d, rounded(wanted * inverse(d.astype("f4"))[:, None], -most, most)


def symmetric(x: np.ndarray, b: np.ndarray, size: int, lowest: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Sets d; integer scales [n, groups] and x over them [n, 256]: each group's furthest value goes to `lowest`."""
    groups = x.reshape(len(x), 256 // size, size)
    b["d"], scales = super_scale(furthest(groups)[..., 0] / np.float32(lowest), most)
    return scales, (groups * inverse(scaled(b["d"], scales))[..., None]).reshape(x.shape)


def ranged(x: np.ndarray, b: np.ndarray, size: int, top: int, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sets d and dmin; scales, minima [n, groups] and codes [n, 256] from each group's lowest value, 0 at most."""
    groups = x.reshape(len(x), 256 // size, size)
    low = np.minimum(groups.min(axis=-1), 0)
    b["dmin"], minima = super_scale(-low, most)
    floor = scaled(b["dmin"], minima)
    b["d"], scales = super_scale(np.maximum(groups.max(axis=-1) + floor, 0) / np.float32(top), most)
    codes = (groups + floor[..., None]) * inverse(scaled(b["d"], scales))[..., None]
    return scales.view("u1"), minima.view("u1"), rounded(codes, 0, top).view("u1").reshape(x.shape)


def pack_q2_k(x, b):
    scales, minima, q = ranged(x, b, 16, 3, 15)
    b["scales"], b["qs"] = scales | minima << 4, gather(q, 32, 2)


def pack_q3_k(x, b):
    scales, over = symmetric(x, b, 16, -4, 31)
    scales, q = (scales + 32).view("u1"), (rounded(over, -4, 3) + 4).view("u1")
    b["scales"] = np.concatenate([gather(scales & 15, 8, 4), gather(scales >> 4, 4, 2)], axis=1)
    b["qs"], b["hmask"] = gather(q & 3, 32, 2), gather(q >> 2, 32, 1)


def pack_q4_k(x, b):
    scales, minima, q = ranged(x, b, 32, 15, 63)
    b["scales"], b["qs"] = twelve(scales, minima), gather(q, 32, 4)


def pack_q5_k(x, b):
    scales, minima, q = ranged(x, b, 32, 31, 63)
    b["scales"], b["qs"], b["qh"] = twelve(scales, minima), gather(q & 15, 32, 4), gather(q >> 4, 32, 1)


def pack_q6_k(x, b):
    b["scales"], over = symmetric(x, b, 16, -32, 127)
    q = (rounded(over, -32, 31) + 32).view("u1")
    b["ql"], b["qh"] = gather(q & 15, 64, 4), gather(q >> 4, 32, 2)


def pack_iq4_xs(x, b):
    scales, over = symmetric(x, b, 32, IQ4[0], 31)
    scales = (scales + 32).view("u1")
    b["scales_l"] = gather(scales & 15, 1, 4)
    b["scales_h"] = gather(scales >> 4, 1, 2).view("<u2")[:, 0]
    b["qs"] = gather(nearest(IQ4, over), 16, 4)
