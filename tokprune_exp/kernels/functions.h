// Functions of registers full of floats.

#pragma once

#include <cstdint>

#include "vectors.h"

namespace {

typedef int32_t Ints __attribute__((vector_size(4 * W), aligned(4), may_alias));

// e^x for x <= 0: x = n ln 2 + r, a Taylor polynomial for e^r, and n added to the exponent's bits.
inline Vec exponential(Vec x) {
    const Vec lowest = fill(-87.0f);
    x = x > lowest ? x : lowest;
    const Vec magic = fill(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number, held in the low bits
    const Vec shifted = x * 1.44269504f + magic;
    const Vec n = shifted - magic;
    const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec e = fill(1.0f / 5040.0f);
    for (float factor : {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f}) e = e * r + factor;
    Ints bits = reinterpret_cast<const Ints&>(e) + (reinterpret_cast<const Ints&>(shifted) << 23);
    return reinterpret_cast<const Vec&>(bits);
}

// The normal distribution's share below x, which is 1/2 + x P(x^2) / Q(x^2) fitted by least squares: off by 1e-6 at most,
// as PyTorch's own.
inline Vec normal_share(Vec x) {
    const Vec end = fill(5.4f);
    Vec z = x < end ? x : end;
    z = z > -end ? z : -end;
    const Vec s = z * z;
    Vec p = fill(2.27770105e-8f), q = fill(1.20866321e-6f);
    for (float next : {6.49037202e-6f, 1.76264322e-4f, 4.72238846e-3f, 3.44918966e-2f, 3.98942053e-1f}) p = p * s + next;
    for (float next : {7.65096484e-5f, 1.9254809e-3f, 2.90277954e-2f, 2.53122658e-1f, 1.0f}) q = q * s + next;
    return 0.5f + z * (p / q);
}

}  // namespace
