// What a plan of STTABT is made of: the attention scores of a small encoder, and the way back through them.
//
// Scores lie on the grid (texts, heads, width, width); a text's tokens are the first ones of its row. Sums over heads,
// rows and tokens are made in a fixed order, so no plan depends on the number of threads or on other texts.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "functions.h"
#include "vectors.h"

namespace {

constexpr float SMALL = 1e-7f;
constexpr long FEW = 1 << 14;  // numbers that are looked at before a second thread has woken up

inline int filled_up(int count) { return (count + W - 1) / W * W; }

// Softmax of a row whose places behind `count`, up to `padded`, hold any finite number: they become 0.
void softmax(float* row, int count, int padded) {
    float most = row[0];
    for (int j = 1; j < count; ++j) most = std::max(most, row[j]);
    std::fill(row + count, row + padded, most - 200.0f);
    Vec total{};
    for (int j = 0; j < padded; j += W) store(row + j, exponential(load(row + j) - most));
    std::fill(row + count, row + padded, 0.0f);
    for (int j = 0; j < padded; j += W) total += load(row + j);
    const Vec share = fill(1.0f / sum_of(total));
    for (int j = 0; j < padded; j += W) store(row + j, load(row + j) * share);
}

// One head of one text: scores of all its tokens onto the grid and, if asked for, the mix of the values.
void attend_head(const float* query, const float* key, const float* value, long stride, int tokens, int size, long width,
                 float* scores, float* context, long context_stride) {
    static thread_local Room rooms[3];
    const int padded = filled_up(tokens);
    float *keys = rooms[0].of(size * padded), *values = rooms[1].of(size * padded), *weights = rooms[2].of(padded);
    for (int d = 0; d < size; ++d) {
        for (int j = 0; j < tokens; ++j) keys[d * padded + j] = key[j * stride + d];
        std::fill(keys + d * padded + tokens, keys + (d + 1) * padded, 0.0f);
        if (!context) continue;
        for (int j = 0; j < tokens; ++j) values[d * padded + j] = value[j * stride + d];
        std::fill(values + d * padded + tokens, values + (d + 1) * padded, 0.0f);
    }
    const float scale = 1.0f / std::sqrt(static_cast<float>(size)), absent = -std::numeric_limits<float>::infinity();
    for (int i = 0; i < tokens; ++i) {
        for (int j = 0; j < padded; j += W) {
            Vec sum{};
            for (int d = 0; d < size; ++d) sum += (query[i * stride + d] * scale) * load(keys + d * padded + j);
            store(weights + j, sum);
        }
        std::copy_n(weights, tokens, scores + i * width);
        std::fill(scores + i * width + tokens, scores + (i + 1) * width, absent);
        if (!context) continue;
        softmax(weights, tokens, padded);
        for (int d = 0; d < size; ++d) {
            Vec sum{};
            for (int j = 0; j < padded; j += W) sum += load(weights + j) * load(values + d * padded + j);
            context[i * context_stride + d] = sum_of(sum);
        }
    }
    std::fill(scores + tokens * width, scores + width * width, absent);
}

struct Texts {
    const float* const* scores;  // of every layer
    const uint8_t *valid, *always;  // `always`: tokens that are in every set, or null
    int layers, count, heads;
    long width;
};

// Which tokens the next layer needs, how much each of them weighs, and what a layer's attention to them says.
struct Needed {
    std::vector<uint8_t> is_needed;
    std::vector<float> share, weight, importance;
    float total = 0;  // by which the sum of the rows is divided
};

// importance_i = sum_t weight_t mean_h row(scores_ht)_i / total, over the rows t that are needed.
template <typename Row>
void ask_rows(const Texts& texts, int layer, int text, int tokens, Needed& needed, Row row) {
    static thread_local Room rooms[1];
    std::vector<int> asked;
    for (int t = 0; t < tokens; ++t)
        if (needed.is_needed[t]) asked.push_back(t);
    const int padded = filled_up(tokens);
    float* rows = rooms[0].of(asked.size() * padded);
    const float* scores = texts.scores[layer] + text * texts.heads * texts.width * texts.width;
#pragma omp parallel for if (static_cast<long>(asked.size()) * texts.heads * tokens > FEW)
    for (size_t at = 0; at < asked.size(); ++at) {
        static thread_local Room own[1];
        float *one = own[0].of(padded), *mean = rows + at * padded;
        std::fill_n(mean, padded, 0.0f);
        for (int h = 0; h < texts.heads; ++h) {
            std::copy_n(scores + (h * texts.width + asked[at]) * texts.width, tokens, one);
            row(one, tokens, padded);
            for (int j = 0; j < padded; j += W) store(mean + j, load(mean + j) + load(one + j));
        }
        for (int j = 0; j < padded; j += W) store(mean + j, load(mean + j) / fill(static_cast<float>(texts.heads)));
    }
    std::fill_n(needed.importance.begin(), tokens, 0.0f);
    for (size_t at = 0; at < asked.size(); ++at)
        for (int j = 0; j < tokens; ++j) needed.importance[j] += needed.weight[asked[at]] * rows[at * padded + j];
    for (int j = 0; j < tokens; ++j) needed.importance[j] /= needed.total;
}

// Scores of a row standardised over its tokens, through the normal distribution (eq. 3).
void standardise(float* row, int count, int padded) {
    std::fill(row + count, row + padded, 0.0f);
    Vec sums{};
    for (int j = 0; j < padded; j += W) sums += load(row + j);
    const float mean = sum_of(sums) / count;
    float square = 0;
    for (int j = 0; j < count; ++j) square += (row[j] - mean) * (row[j] - mean);
    const Vec deviation = fill(std::max(std::sqrt(square / count + SMALL * SMALL), SMALL)), middle = fill(mean);
    for (int j = 0; j < padded; j += W) store(row + j, normal_share((load(row + j) - middle) / deviation));
}

// Walk from the last layer back; `choose` turns the importance of a layer into the next set and the next weights.
template <typename Row, typename Choose>
void walk_back(const Texts& texts, int text, float propagation, float* importance, uint8_t* keep, Row row, Choose choose) {
    const int tokens = std::count(texts.valid + text * texts.width, texts.valid + (text + 1) * texts.width, 1);
    const long step = texts.count * texts.width;
    Needed needed{std::vector<uint8_t>(tokens), std::vector<float>(tokens), std::vector<float>(tokens),
                  std::vector<float>(tokens)};
    needed.is_needed[0] = 1;
    needed.share[0] = 1;
    for (int layer = texts.layers; layer >= 0; --layer) {
        if (layer < texts.layers) {
            needed.total = 0;
            for (int t = 0; t < tokens; ++t) {
                needed.weight[t] = needed.is_needed[t] * (propagation * needed.share[t] + 1 - propagation);
                needed.total += needed.is_needed[t];
            }
            choose.divide(needed);
            ask_rows(texts, layer, text, tokens, needed, row);
            choose(layer, text, tokens, needed);
            if (texts.always)
                for (int t = 0; t < tokens; ++t) needed.is_needed[t] |= texts.always[text * texts.width + t];
            choose.weigh(tokens, needed);
        }
        const long at = layer * step + text * texts.width;
        std::fill_n(importance + at, texts.width, 0.0f);
        std::fill_n(keep + at, texts.width, uint8_t{0});
        std::copy_n((layer == texts.layers ? needed.share : choose.shown(needed)).data(), tokens, importance + at);
        std::copy_n(needed.is_needed.data(), tokens, keep + at);
    }
}

// Algorithm 1: the k most important tokens, ties to the earlier one; importances of the set, scaled to sum 1, are shares.
struct MostAttended {
    const int64_t* counts;  // k of every text

    void divide(Needed&) const {}
    void operator()(int, int text, int tokens, Needed& needed) const {
        std::vector<int> order(tokens);
        for (int t = 0; t < tokens; ++t) order[t] = t;
        const auto& importance = needed.importance;
        const int k = static_cast<int>(std::min<int64_t>(counts[text], tokens));
        std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](int a, int b) {
            return importance[a] > importance[b] || (importance[a] == importance[b] && a < b);
        });
        for (int i = 0; i < k; ++i) needed.is_needed[order[i]] = 1;
    }
    void weigh(int tokens, Needed& needed) const {
        float sum = 0;
        for (int t = 0; t < tokens; ++t) sum += needed.is_needed[t] * needed.importance[t];
        for (int t = 0; t < tokens; ++t)
            needed.share[t] = needed.is_needed[t] * needed.importance[t] / std::max(sum, 1e-12f);
    }
    const std::vector<float>& shown(const Needed& needed) const { return needed.importance; }
};

// Concrete masks, hard: s = floor + (1 - floor) b / max b, and a token stays where logit p + logit s >= 0 (eqs. 4, 5).
struct HardConcrete {
    const float* logits;  // of p_theta, of every layer
    float floor;

    void divide(Needed& needed) const { needed.total += SMALL; }
    void operator()(int layer, int, int tokens, Needed& needed) const {
        const float most = *std::max_element(needed.importance.begin(), needed.importance.begin() + tokens) + SMALL;
        for (int t = 0; t < tokens; ++t) {
            const float s = floor + (1 - floor) * needed.importance[t] / most;
            needed.share[t] = s;
            if (logits[layer] + std::log(s + SMALL) - std::log(1 - s + SMALL) >= 0) needed.is_needed[t] = 1;
        }
    }
    void weigh(int, Needed&) const {}
    const std::vector<float>& shown(const Needed& needed) const { return needed.share; }
};

// Whether every text's tokens are the first of its row, and there is one at least.
bool are_first(const Texts& texts) {
    for (int text = 0; text < texts.count; ++text) {
        const uint8_t* row = texts.valid + text * texts.width;
        if (!row[0] || !std::is_sorted(row, row + texts.width, std::greater<uint8_t>())) return false;
    }
    return true;
}

template <typename Row, typename Choose>
int plan(const Texts& texts, float propagation, float* importance, uint8_t* keep, Row row, Choose choose) {
    if (!are_first(texts)) return 1;
    const auto walk = [&](int text) { walk_back(texts, text, propagation, importance, keep, row, choose); };
    if (texts.count == 1) {  // outside of any parallel region: inside of one, the rows' threads would be new ones each time
        walk(0);
        return 0;
    }
#pragma omp parallel for schedule(dynamic)
    for (int text = 0; text < texts.count; ++text) walk(text);
    return 0;
}

}  // namespace

// Scores on the grid, -inf where no token is, and the context of packed rows unless it is null.
extern "C" void attend_on_grid(const float* query, const float* key, const float* value, long stride,
                               const int32_t* starts, int texts, int heads, int head_dim, long width, float* scores,
                               float* context) {
    const long dim = static_cast<long>(heads) * head_dim;
#pragma omp parallel for schedule(dynamic) if (texts * heads > 1)
    for (int task = 0; task < texts * heads; ++task) {
        const long row = starts[task / heads], at = row * stride + task % heads * head_dim;
        attend_head(query + at, key + at, value + at, stride, starts[task / heads + 1] - row, head_dim, width,
                    scores + task * width * width, context ? context + row * dim + task % heads * head_dim : nullptr, dim);
    }
}

extern "C" int plan_most_attended(const Texts* texts, float propagation, const int64_t* counts, float* importance,
                                  uint8_t* keep) {
    return plan(*texts, propagation, importance, keep, softmax, MostAttended{counts});
}

extern "C" int plan_concrete(const Texts* texts, float propagation, const float* logits, float floor, float* importance,
                             uint8_t* keep) {
    return plan(*texts, propagation, importance, keep, standardise, HardConcrete{logits, floor});
}
