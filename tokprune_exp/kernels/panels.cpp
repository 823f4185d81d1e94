// Linear layers in float32 whose weights lie in panels, and what follows the attention in a layer, in one call.
//
// A panel holds, input after input, the weights of as many outputs as three registers take: it is read from its start to
// its end, which is as fast as memory gives it. The sums of a few rows with a panel stay in registers, for any number of
// rows. Each sum is made by one thread in the order of the inputs, so no answer depends on the threads or on other rows.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "functions.h"
#include "vectors.h"

namespace {

constexpr int REGISTERS = 3, PANEL = REGISTERS * W;
constexpr int64_t TASK = 96;     // rows that one task multiplies by one panel
constexpr int64_t BLOCK = 384;   // rows that go through a feed-forward block together: what they become stays in the cache
constexpr int64_t FEW = 1 << 16;  // multiply-adds that are done before a second thread has woken up

struct Linear {
    const float *panels, *bias;  // of the bias, zeros fill the last panel
    int64_t in, out;
};
struct Norm {
    const float *weight, *bias;
    float eps;
};
struct Block {
    Linear project, widen, narrow;
    Norm attended, output;
};

inline Vec gelu(Vec x) { return x * normal_share(x); }

// R rows times one panel; the first `columns` outputs of it are there.
template <int R>
void multiply_tile(const float* x, const float* panel, const float* bias, int64_t in, int columns, bool is_gelu,
                   const float* other, float* y, int64_t out) {
    for (int r = 0; r < R; ++r)  // where the sums will be written is fetched while they are made
        for (int v = 0; v < REGISTERS; ++v) __builtin_prefetch(y + r * out + v * W, 1);
    Vec sums[R][REGISTERS];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < REGISTERS; ++v) sums[r][v] = load(bias + v * W);
    for (int64_t k = 0; k < in; ++k, panel += PANEL) {
        Vec weights[REGISTERS];
        for (int v = 0; v < REGISTERS; ++v) weights[v] = load(panel + v * W);
        for (int r = 0; r < R; ++r) {
            const float value = x[r * in + k];
            for (int v = 0; v < REGISTERS; ++v) sums[r][v] += value * weights[v];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < REGISTERS; ++v) {
            Vec sum = is_gelu ? gelu(sums[r][v]) : sums[r][v];
            const int64_t at = r * out + v * W;
            const int left = std::min(W, columns - v * W);
            if (left == W) {
                store(y + at, other ? sum + load(other + at) : sum);
            } else {
                for (int i = 0; i < left; ++i) y[at + i] = other ? sum[i] + other[at + i] : sum[i];
            }
        }
}

template <int R, typename... Arguments>
void multiply_rows(int rows, Arguments... arguments) {
    if (rows == R) return multiply_tile<R>(arguments...);
    if constexpr (R > 1) multiply_rows<R - 1>(rows, arguments...);
}

// act(x W^T + b) + other, shared among the threads that meet here; it is done when they leave.
void multiply_together(const Linear& layer, const float* x, int64_t rows, bool is_gelu, const float* other, float* y) {
    const int64_t panels = (layer.out + PANEL - 1) / PANEL;
    const int64_t tiles = (rows + ROWS - 1) / ROWS, parts = std::max<int64_t>(1, (rows + TASK - 1) / TASK);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < panels * parts; ++task) {
        const int64_t part = task / panels, panel = task % panels, column = panel * PANEL;
        for (int64_t tile = tiles * part / parts; tile < tiles * (part + 1) / parts; ++tile) {
            const int64_t row = rows * tile / tiles, end = rows * (tile + 1) / tiles, at = row * layer.out + column;
            multiply_rows<ROWS>(static_cast<int>(end - row), x + row * layer.in, layer.panels + column * layer.in,
                                layer.bias + column, layer.in,
                                static_cast<int>(std::min<int64_t>(PANEL, layer.out - column)), is_gelu,
                                other ? other + at : nullptr, y + at, layer.out);
        }
    }
}

void normalise(float* row, int64_t dim, const Norm& norm) {
    const int64_t whole = dim / W * W;
    Vec sums{}, squares{};
    float sum = 0, square = 0;
    for (int64_t i = 0; i < whole; i += W) sums += load(row + i);
    for (int64_t i = whole; i < dim; ++i) sum += row[i];
    const float mean = (sum + sum_of(sums)) / dim;
    for (int64_t i = 0; i < whole; i += W) squares += (load(row + i) - mean) * (load(row + i) - mean);
    for (int64_t i = whole; i < dim; ++i) square += (row[i] - mean) * (row[i] - mean);
    const float scale = 1.0f / std::sqrt((square + sum_of(squares)) / dim + norm.eps);
    for (int64_t i = 0; i < whole; i += W)
        store(row + i, (load(row + i) - mean) * scale * load(norm.weight + i) + load(norm.bias + i));
    for (int64_t i = whole; i < dim; ++i) row[i] = (row[i] - mean) * scale * norm.weight[i] + norm.bias[i];
}

void normalise_together(float* rows, int64_t count, int64_t dim, const Norm& norm) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < count; ++row) normalise(rows + row * dim, dim, norm);
}

}  // namespace

extern "C" int64_t panel_width() { return PANEL; }

extern "C" void multiply(const Linear* layer, const float* x, int64_t rows, int is_gelu, const float* other, float* y) {
#pragma omp parallel if (rows * layer->in * layer->out > FEW)
    multiply_together(*layer, x, rows, is_gelu, other, y);
}

// attended = norm(context P^T + hidden), out = norm(gelu(attended W^T) N^T + attended), biases left out here.
extern "C" void finish(const Block* block, const float* hidden, const float* context, int64_t rows, float* out) {
    static thread_local Room rooms[2];
    const int64_t blocks = (rows + BLOCK - 1) / BLOCK, most = std::min(rows, BLOCK), dim = block->project.out;
    float *attended = rooms[0].of(most * dim), *wide = rooms[1].of(most * block->widen.out);
#pragma omp parallel
    for (int64_t one = 0; one < blocks; ++one) {
        const int64_t row = rows * one / blocks, count = rows * (one + 1) / blocks - row, at = row * dim;
        multiply_together(block->project, context + at, count, false, hidden + at, attended);
        normalise_together(attended, count, dim, block->attended);
        multiply_together(block->widen, attended, count, true, nullptr, wide);
        multiply_together(block->narrow, wide, count, false, attended, out + at);
        normalise_together(out + at, count, dim, block->output);
    }
}
