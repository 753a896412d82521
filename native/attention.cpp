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
    float most = kernels().largest(scores, count);
    if (sink) most = std::max(most, *sink);
    float sum = kernels().exponentials(scores, most, count);
    if (sink) {
        float alone = *sink;
        sum = sum + kernels().exponentials(&alone, most, 1);
    }
    return sum;
}

// Positions [from, to) of the values, and the weights of all queries from position `first` on, `stride` apart.
struct ValueBlock {
    const Queries &q;
    const Past &past;
    const float *weights;
    int64_t first, stride, from, to;
    float *out;

    // Positions [begin, end) of `count` queries that all see them.
    void mix(int64_t query, int64_t count, int64_t begin, int64_t end) const {
        if (begin >= end) return;
        kernels().mix(weights + query * stride + begin - first, past.value(begin), past.dtype,
                      {count, end - begin, q.value_width, past.values_stride, stride}, out + query * q.value_width);
    }

    // A few queries: what only some see, what all see, what only some see.
    void pass(int64_t query, int64_t count) const {
        const int64_t begin = std::clamp(q.begin(query + count - 1), from, to),
                      end = std::clamp(q.end(query), begin, to);
        for (int64_t i = query; begin > from && i < query + count; i++)
            mix(i, 1, std::max(q.begin(i), from), std::min(q.end(i), begin));
        mix(query, count, begin, end);
        for (int64_t i = query; end < to && i < query + count; i++)
            mix(i, 1, std::max(q.begin(i), end), std::min(q.end(i), to));
    }
};

// A query as integers of 16 bits, in the order that `whole_scores` takes; returns their scale.
float make_whole(const float *query, int64_t width, int32_t *words) {
    const int64_t numbers = whole_words(width) * 2;
    float most = 0.0f;
    bool finite = true;
    for (int64_t a = 0; a < width; a++) {
        const float size = std::fabs(query[a]);
        finite = finite && size <= 3.4e38f, most = std::max(most, size);
    }
    const float inverse = finite && most > 1e-30f ? float(MOST_WHOLE) / most : 0.0f;
    int32_t whole[4];
    for (int64_t a = 0; a < numbers; a += 4) {
        for (int64_t i = 0; i < 4; i++) {
            const float x = a + i < width && finite ? query[a + i] * inverse : 0.0f;
            whole[i] = int32_t((x + 12582912.0f) - 12582912.0f);  // to the nearest, ties to even
        }
        for (int64_t i = 0; i < 2; i++)
            words[a / 2 + i] = int32_t((uint32_t(whole[i]) & 0xffffu) | uint32_t(whole[i + 2]) << 16);
    }
    return finite ? most / float(MOST_WHOLE) : from_bits(0x7fc00000u);  // NaN stays visible
}

void whole_scores(const Queries &q, const Past &past, const ScoreShape &s, float *scores, AttentionMemory &memory) {
    const int64_t first = q.begin(0), words = whole_words(q.width), count = q.count();
    auto data = memory.queries.get<int32_t>(count * (words + 1));
    auto scales = reinterpret_cast<float *>(data + count * words);
    for (int64_t i = 0; i < count; i++) scales[i] = make_whole(q.data + i * q.width, q.width, data + i * words);
    const WholeKeys keys{static_cast<const int8_t *>(past.key(first)), past.key_scales + first};
    kernels().whole_scores({data, scales}, keys, s, scores, memory.columns.get<uint32_t>(words * COLUMNS));
}

}  // namespace

void attend(const Queries &q, const Past &past, float *out, AttentionMemory &memory) {
    const int64_t count = q.count(), first = q.begin(0), end = q.end(count - 1), seen = end - first,
                  width = q.value_width;
    float *scores = memory.scores.get<float>(count * (seen + 1)), *sums = scores + count * seen;
    const ScoreShape shape{count, seen, q.width, past.keys_stride, seen, q.scale};
    const bool whole = past.dtype == MOESTRO_ROWS_INT8;
    if (whole) whole_scores(q, past, shape, scores, memory);
    else
        kernels().scores(q.data, past.key(first), past.dtype == MOESTRO_ROWS_F32, shape, scores,
                         memory.columns.get<uint32_t>(q.width * COLUMNS));
    for (int64_t i = 0; i < count; i++) {
        float *weights = scores + i * seen + q.begin(i) - first;
        const int64_t positions = q.end(i) - q.begin(i);
        sums[i] = soften(weights, positions, q.sinks ? q.sinks + i % q.heads : nullptr);
        if (whole) kernels().times(past.value_scales + q.begin(i), weights, positions);
    }
    std::fill(out, out + count * width, 0.0f);
    for (int64_t from = first; from < end; from += POSITIONS) {
        const ValueBlock block{q, past, scores, first, seen, from, std::min(from + POSITIONS, end), out};
        for (int64_t i = 0; i < count; i += TOGETHER) block.pass(i, std::min(TOGETHER, count - i));
    }
    for (int64_t i = 0; i < count; i++)
        for (int64_t a = 0; a < width; a++) out[i * width + a] /= sums[i];
}

}  // namespace moestro
