// Attention within packed sequences, and the attention that every key receives, in one pass over each score matrix.
//
//     context_i  = sum_j p_ij v_j          p_ij = softmax_j(q_i k_j / sqrt(D))
//     received_j = 1/H sum_h sum_i p^h_ij
//
// One task is one head of one sequence. The scores of a few queries against all keys stay in the first-level cache:
// products, softmax, column sums and the mix of the values follow each other there, and no score matrix is ever stored.
// Sums over heads are made in a fixed order, so the answer does not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "functions.h"
#include "vectors.h"

namespace {

constexpr int PAIR = 2 * W;
constexpr float FAR_BELOW = -1e30f;  // the score of a key that is not there

inline float widen(float value) { return value; }
inline float widen(uint16_t value) {  // bfloat16 is the upper half of a float
    uint32_t bits = static_cast<uint32_t>(value) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
inline void narrow(float value, float* to) { *to = value; }
inline void narrow(float value, uint16_t* to) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    *to = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

struct Scratch {  // of one head: keys by number, then by token; the others by token, and weights by query
    float *keys, *values, *weights, *received;
};

// R queries times the keys of N registers.
template <int R, int D, int N>
inline void score(const float (&q)[R][D], const float* columns, int padded, float* weights) {
    Vec sums[R][N] = {};
    for (int d = 0; d < D; ++d, columns += padded) {
        Vec keys[N];
        for (int n = 0; n < N; ++n) keys[n] = load(columns + n * W);
        for (int r = 0; r < R; ++r)
            for (int n = 0; n < N; ++n) sums[r][n] += q[r][d] * keys[n];
    }
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) store(weights + r * padded + n * W, sums[r][n]);
}

// R queries of one head: scores, softmax, column sums, context.
template <typename T, int D, int R>
void attend_rows(const T* query, long query_stride, int keys, int padded, const Scratch& scratch, bool wants_received,
                 T* context, long context_stride) {
    float q[R][D];
    const float scale = 1.0f / std::sqrt(static_cast<float>(D));
    for (int r = 0; r < R; ++r)
        for (int d = 0; d < D; ++d) q[r][d] = widen(query[r * query_stride + d]) * scale;

    float* weights = scratch.weights;
    const float* columns = scratch.keys;
    int done = 0;
    for (; done + 3 * W <= padded; done += 3 * W) score<R, D, 3>(q, columns + done, padded, weights + done);
    if (padded - done == 2 * W) score<R, D, 2>(q, columns + done, padded, weights + done);
    if (padded - done == W) score<R, D, 1>(q, columns + done, padded, weights + done);
    for (int r = 0; r < R; ++r) {
        float* row = weights + r * padded;
        std::fill(row + keys, row + padded, FAR_BELOW);
        Vec peak = load(row);
        for (int j = W; j < padded; j += W) peak = load(row + j) > peak ? load(row + j) : peak;
        const Vec most = fill(max_of(peak));
        Vec total{};
        for (int j = 0; j < padded; j += W) {
            const Vec e = exponential(load(row + j) - most);
            store(row + j, e);
            total += e;
        }
        const Vec share = fill(1.0f / sum_of(total));
        for (int j = 0; j < padded; j += W) store(row + j, load(row + j) * share);
    }
    if (wants_received)
        for (int j = 0; j < padded; j += W) {
            Vec sum = load(scratch.received + j);
            for (int r = 0; r < R; ++r) sum += load(weights + r * padded + j);
            store(scratch.received + j, sum);
        }
    for (int d = 0; d < D; d += PAIR) {
        Vec left[R], right[R];
        for (int r = 0; r < R; ++r) left[r] = right[r] = Vec{};
        for (int j = 0; j < keys; ++j) {
            const Vec a = load(scratch.values + j * D + d), b = load(scratch.values + j * D + d + W);
            for (int r = 0; r < R; ++r) {
                const float p = weights[r * padded + j];
                left[r] += p * a;
                right[r] += p * b;
            }
        }
        for (int r = 0; r < R; ++r)
            for (int i = 0; i < W; ++i) {
                narrow(left[r][i], context + r * context_stride + d + i);
                narrow(right[r][i], context + r * context_stride + d + W + i);
            }
    }
}

// Call with a number of rows that the compiler knows.
template <int R, typename Call>
void with_rows(int rows, Call call) {
    if (rows == R) return call(std::integral_constant<int, R>{});
    if constexpr (R > 1) with_rows<R - 1>(rows, call);
}

template <typename T, int D>
void attend_head(const T* query, long query_stride, int queries, const T* key, const T* value, long key_stride, int keys,
                 T* context, long context_stride, float* received) {
    static thread_local Room rooms[4];
    const int padded = (keys + W - 1) / W * W;
    const size_t size = static_cast<size_t>(D) * padded;
    const Scratch scratch{rooms[0].of(size), rooms[1].of(size), rooms[2].of(ROWS * padded), rooms[3].of(padded)};
    for (int j = 0; j < keys; ++j)
        for (int d = 0; d < D; ++d) scratch.values[static_cast<size_t>(j) * D + d] = widen(value[j * key_stride + d]);
    for (int some = 0; some < keys; some += W)  // of a few keys at a time, so that what is read again lies near
        for (int d = 0; d < D; ++d)
            for (int j = some; j < std::min(some + W, keys); ++j)
                scratch.keys[static_cast<size_t>(d) * padded + j] = widen(key[j * key_stride + d]);
    for (int d = 0; d < D; ++d)
        std::fill_n(scratch.keys + static_cast<size_t>(d) * padded + keys, padded - keys, 0.0f);
    if (received) std::fill_n(scratch.received, padded, 0.0f);
    const int tiles = (queries + ROWS - 1) / ROWS;
    for (int tile = 0; tile < tiles; ++tile) {
        const long row = static_cast<long>(queries) * tile / tiles, end = static_cast<long>(queries) * (tile + 1) / tiles;
        with_rows<ROWS>(static_cast<int>(end - row), [&](auto rows) {
            attend_rows<T, D, decltype(rows)::value>(query + row * query_stride, query_stride, keys, padded, scratch,
                                                     received != nullptr, context + row * context_stride,
                                                     context_stride);
        });
    }
    if (received) std::copy_n(scratch.received, keys, received);
}

template <typename T, int D>
void attend_all(const T* query, long query_stride, const T* key, const T* value, long key_stride,
                const int32_t* query_starts, const int32_t* key_starts, int sequences, int heads, T* context,
                float* received, float* received_per_head) {
    const long dim = static_cast<long>(heads) * D, total = key_starts[sequences];
#pragma omp parallel for schedule(dynamic) if (sequences * heads > 1)
    for (int task = 0; task < sequences * heads; ++task) {
        const int s = task / heads, h = task % heads;
        const long q0 = query_starts[s], k0 = key_starts[s];
        attend_head<T, D>(query + q0 * query_stride + h * D, query_stride, query_starts[s + 1] - q0,
                          key + k0 * key_stride + h * D, value + k0 * key_stride + h * D, key_stride,
                          key_starts[s + 1] - k0, context + q0 * dim + h * D, dim,
                          received ? received_per_head + h * total + k0 : nullptr);
    }
    if (received)
        for (long j = 0; j < total; ++j) {
            float sum = 0;
            for (int h = 0; h < heads; ++h) sum += received_per_head[h * total + j];
            received[j] = sum / heads;
        }
}

template <typename T>
int attend(const T* query, long query_stride, const T* key, const T* value, long key_stride, const int32_t* query_starts,
           const int32_t* key_starts, int sequences, int heads, int head_dim, T* context, float* received,
           float* received_per_head) {
    const auto run = [&](auto dim) {
        attend_all<T, decltype(dim)::value>(query, query_stride, key, value, key_stride, query_starts, key_starts,
                                            sequences, heads, context, received, received_per_head);
        return 0;
    };
    if (head_dim == 32) return run(std::integral_constant<int, 32>{});
    if (head_dim == 64) return run(std::integral_constant<int, 64>{});
    return 1;
}

}  // namespace

#define EXPORT(NAME, T)                                                                                               \
    extern "C" int NAME(const T* query, long query_stride, const T* key, const T* value, long key_stride,             \
                        const int32_t* query_starts, const int32_t* key_starts, int sequences, int heads,             \
                        int head_dim, T* context, float* received, float* received_per_head) {                        \
        return attend(query, query_stride, key, value, key_stride, query_starts, key_starts, sequences, heads,        \
                      head_dim, context, received, received_per_head);                                                \
    }

EXPORT(attend_float32, float)
EXPORT(attend_bfloat16, uint16_t)
