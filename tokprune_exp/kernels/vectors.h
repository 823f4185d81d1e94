// Registers full of floats, as wide as the machine has them, in GCC's and Clang's vector types.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int W = 16, ROWS = 8;  // floats in a register; rows that are worked on together
#elif defined(__AVX2__)
constexpr int W = 8, ROWS = 4;
#else
constexpr int W = 4, ROWS = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * W), aligned(4), may_alias));

inline Vec load(const float* from) { return *reinterpret_cast<const Vec*>(from); }
inline void store(float* to, Vec value) { *reinterpret_cast<Vec*>(to) = value; }
inline Vec fill(float value) { return value - Vec{}; }

// By quarters first: sixteen additions after each other would take as long as the exponentials of a row.
typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
inline Four four_of(const Vec& value, int at) {
    return *reinterpret_cast<const Four*>(reinterpret_cast<const float*>(&value) + at);
}
inline float sum_of(Vec value) {
    Four sum = four_of(value, 0);
    for (int i = 4; i < W; i += 4) sum += four_of(value, i);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}
inline float max_of(Vec value) {
    Four most = four_of(value, 0);
    for (int i = 4; i < W; i += 4) most = four_of(value, i) > most ? four_of(value, i) : most;
    return std::max(std::max(most[0], most[1]), std::max(most[2], most[3]));
}

// Memory that is kept from call to call and grows when it must. It begins where a line of the cache does: a register
// that lies across two lines is read twice.
struct Room {
    std::vector<float> floats;

    float* of(size_t count) {
        constexpr size_t LINE = 16;  // floats
        if (floats.size() < count + LINE) floats.resize(count + LINE);
        const size_t beyond = reinterpret_cast<uintptr_t>(floats.data()) / sizeof(float) % LINE;
        return floats.data() + (LINE - beyond) % LINE;
    }
};

}  // namespace
