// Blocks of queries share what is read of keys and values; the sums of each query run over its own positions in their
// order, so that a token gets the same bits alone and among others.
#include "attention.h"

#include <algorithm>

namespace moestro {
namespace {

constexpr int64_t POSITIONS = 256;  // whose values stay in the cache while all queries pass
constexpr int64_t TOGETHER = 4;     // queries that share a load, where they see the same positions

// Scores of one query → weights that are not yet divided by their sum, which is returned.
float soften(float *scores, int64_t count, const float *sink) {
    float most = *std::max_element(scores, scores + count);
    if (sink) most = std::max(most, *sink);
    float sum = kernels().exponentials(scores, most, count);
    if (sink) {
        float alone = *sink;
        sum = sum + kernels().exponentials(&alone, most, 1);
    }
    return sum;
}

struct Mixing {
    const Queries &q;
    const Past &past;
    const float *weights;  // of a query from position `first` on, `stride` apart
    int64_t first, stride;
    float *out;

    void mix(int64_t query, int64_t count, int64_t from, int64_t to) const {
        if (from >= to) return;
        kernels().mix(weights + query * stride + from - first, past.value(from), past.is_fp32,
                      {count, to - from, q.value_width, past.values_stride, stride}, out + query * q.value_width);
    }

    // Positions [from, to) of a few queries: what only some see, what all see, what only some see.
    void pass(int64_t query, int64_t count, int64_t from, int64_t to) const {
        const int64_t begin = std::clamp(q.begin(query + count - 1), from, to),
                      end = std::clamp(q.end(query), begin, to);
        for (int64_t i = query; begin > from && i < query + count; i++)
            mix(i, 1, std::max(q.begin(i), from), std::min(q.end(i), begin));
        mix(query, count, begin, end);
        for (int64_t i = query; end < to && i < query + count; i++)
            mix(i, 1, std::max(q.begin(i), end), std::min(q.end(i), to));
    }
};

}  // namespace

void attend(const Queries &q, const Past &past, float *out, AttentionMemory &memory) {
    const int64_t count = q.count(), first = q.begin(0), end = q.end(count - 1), seen = end - first;
    float *scores = memory.scores.get<float>(count * (seen + 1)), *sums = scores + count * seen;
    kernels().scores(q.data, past.key(first), past.is_fp32, {count, seen, q.width, past.keys_stride, seen, q.scale},
                     scores, memory.columns.get<uint32_t>(q.width * COLUMNS));
    for (int64_t i = 0; i < count; i++)
        sums[i] = soften(scores + i * seen + q.begin(i) - first, q.end(i) - q.begin(i),
                         q.sinks ? q.sinks + i % q.heads : nullptr);
    std::fill(out, out + count * q.value_width, 0.0f);
    const Mixing mixing{q, past, scores, first, seen, out};
    for (int64_t from = first; from < end; from += POSITIONS)
        for (int64_t i = 0; i < count; i += TOGETHER)
            mixing.pass(i, std::min(TOGETHER, count - i), from, std::min(from + POSITIONS, end));
    for (int64_t i = 0; i < count; i++)
        for (int64_t a = 0; a < q.value_width; a++) out[i * q.value_width + a] /= sums[i];
}

}  // namespace moestro
