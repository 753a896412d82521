// Grouped-query attention of a layer, and what all kinds of attention share.
#include <algorithm>

#include "layers.h"

namespace moestro {
namespace {

constexpr int64_t QUERIES = 32;  // about as many attend together

// Sixteen sums side by side, then added up: one order for every compiler.
float mean(const float *x, int64_t n) {
    float sums[16] = {}, sum = 0.0f;
    for (int64_t i = 0; i < n; i++) sums[i % 16] = sums[i % 16] + x[i];
    for (float each : sums) sum = sum + each;
    return sum / float(n);
}

}  // namespace

void Batch::plan(const moestro_decoder &decoder, int64_t sequences, const moestro_past *their_pasts) {
    d = decoder, b = sequences, pasts = their_pasts, t = 0;
    sequence.clear(), offset.clear(), told.clear();
    for (int64_t s = 0; s < b; s++) {
        for (int64_t i = 0; i < pasts[s].rows; i++, t++) sequence.push_back(s), offset.push_back(i);
        for (int64_t i = pasts[s].told; i > 0; i--) told.push_back(t - i);
    }
    x.resize(size_t(t * d.dim)), added.resize(x.size());
}

std::vector<Part> Batch::parts(int64_t rows) const {
    std::vector<Part> found;
    int64_t first = 0;
    for (int64_t s = 0; s < b; first += pasts[s++].rows)
        for (int64_t i = 0; i < pasts[s].rows; i += rows)
            found.push_back({s, first + i, i, std::min(rows, pasts[s].rows - i)});
    return found;
}

void Batch::turn(float *head, int64_t token) const {
    const int64_t half = d.turning / 2;
    const float *c = cosines + token * half, *s = sines + token * half;
    for (int64_t i = 0; i < half; i++) {
        const float first = head[i], second = head[i + half];
        head[i] = first * c[i] - second * s[i];
        head[i + half] = second * c[i] + first * s[i];
    }
}

void norm(const float *from, const float *gain, const float *bias, int64_t dim, float eps, float *to) {
    if (bias) {
        const float middle = mean(from, dim);
        for (int64_t i = 0; i < dim; i++) to[i] = from[i] - middle;
        from = to;
    }
    const float scale = 1.0f / std::sqrt(kernels().dot(from, from, dim) / float(dim) + eps);
    for (int64_t i = 0; i < dim; i++) to[i] = (from[i] * scale) * gain[i];
    for (int64_t i = 0; bias && i < dim; i++) to[i] = to[i] + bias[i];
}

void set(Prepared &to, int64_t row, const float *from, int64_t count, Memory &memory) {
    if (to.rows.k == count) return to.set(row, from);
    memory.row.assign(size_t(to.rows.k), 0.0f);
    std::copy(from, from + count, memory.row.begin());
    to.set(row, memory.row.data());
}

const float *before_attention(const Batch &batch, const moestro_layer &layer, int64_t token, Memory &memory) {
    memory.normed.resize(size_t(batch.d.dim));
    norm(batch.residual(token), layer.attention_norm, layer.attention_norm_bias, batch.d.dim, batch.d.eps,
         memory.normed.data());
    return memory.normed.data();
}

float sigmoid(float x) {
    float e = -x;
    kernels().exponentials(&e, 0.0f, 1);
    return 1.0f / (1.0f + e);
}

void gate(float *x, const float *by, int64_t count, Memory &memory) {
    memory.row.assign(by, by + count);
    for (float &each : memory.row) each = -each;
    kernels().exponentials(memory.row.data(), 0.0f, count);
    for (int64_t i = 0; i < count; i++) x[i] = x[i] / (1.0f + memory.row[size_t(i)]);
}

void grow(std::vector<float> &numbers, int64_t tokens, int64_t width) {
    numbers.resize(std::max(numbers.size(), size_t(tokens * width)));
}

void project(Team &team, Batch &batch, const moestro_layer &layer, const std::vector<float> &mixed, int64_t width,
             Prepared &rows, Memory &memory) {
    int64_t from, to;
    while (team.take(batch.t, 1, &from, &to)) set(rows, from, mixed.data() + from * width, width, memory);
    team.wait();
    multiply_all(team, layer.out, rows, layer.out_bias, batch.added.data(), batch.d.dim);
}

void keep(const float *from, int32_t dtype, void *to, float *scales, int64_t row, int64_t width) {
    const int64_t at = row * width;
    int32_t sum;
    if (dtype == MOESTRO_ROWS_F32) std::copy(from, from + width, static_cast<float *>(to) + at);
    else if (dtype == MOESTRO_ROWS_INT8)
        kernels().quantise(from, width, width, static_cast<int8_t *>(to) + at, scales + row, &sum);
    else
        for (int64_t i = 0; i < width; i++) static_cast<uint16_t *>(to)[at + i] = to_bf16(from[i]);
}

bool GroupedAttention::good(const moestro_layer &layer, const moestro_decoder &d) {
    const int64_t inner = d.heads * d.head_dim, wide = inner * (1 + (d.gated != 0)) + 2 * d.groups * d.head_dim;
    return is(layer.qkv, wide, d.dim) && is(layer.out, d.dim, inner) && !(d.gated && d.norm_all);
}

void GroupedAttention::plan(const Batch &batch) {
    const moestro_decoder &d = batch.d;
    const auto other = [](const moestro_layer &layer) { return layer.latent || layer.delta; };
    if (std::all_of(d.layer, d.layer + d.layers, other)) return;
    heads_ = d.heads, groups_ = d.groups, width_ = d.head_dim, inner_ = heads_ * width_;
    step_ = width_ * (1 + (d.gated != 0)), wide_ = heads_ * step_ + 2 * groups_ * width_;
    parts_ = batch.parts(std::max(int64_t(1), QUERIES / (heads_ / groups_)));
    qkv_.resize(size_t(batch.t * wide_)), mixed_.resize(size_t(batch.t * inner_));
}

void GroupedAttention::turn(const Batch &batch, float *head, const float *gain, int64_t t) const {
    const moestro_decoder &d = batch.d;
    if (gain && !d.norm_all && !d.norm_rotated) norm(head, gain, nullptr, width_, d.eps, head);
    batch.turn(head, t);
    if (gain && d.norm_rotated) norm(head, gain, nullptr, width_, d.eps, head);
}

// Turn a token's queries and keys, and write its keys and values where its sequence keeps them.
void GroupedAttention::place(const Batch &batch, int64_t l, int64_t t) {
    const moestro_decoder &d = batch.d;
    const moestro_layer &layer = d.layer[l];
    const moestro_past &past = batch.pasts[batch.sequence[size_t(t)]];
    float *query = qkv_.data() + t * wide_, *key = query + heads_ * step_, *value = key + groups_ * width_;
    if (d.norm_all && layer.q_norm) norm(query, layer.q_norm, nullptr, inner_, d.eps, query);
    if (d.norm_all && layer.k_norm) norm(key, layer.k_norm, nullptr, groups_ * width_, d.eps, key);
    for (int64_t h = 0; h < heads_; h++) turn(batch, query + h * step_, layer.q_norm, t);
    for (int64_t g = 0; g < groups_; g++) {
        turn(batch, key + g * width_, layer.k_norm, t);
        const int64_t row = g * past.room[l] + batch.position(t, l);
        const bool whole = d.cache_dtype == MOESTRO_ROWS_INT8;
        keep(key + g * width_, d.cache_dtype, past.keys[l], whole ? past.key_scales[l] : nullptr, row, width_);
        keep(value + g * width_, d.cache_dtype, past.values[l], whole ? past.value_scales[l] : nullptr, row, width_);
    }
}

void GroupedAttention::attend(const Batch &batch, int64_t l, const Part &part, int64_t g, Memory &memory) {
    const moestro_layer &layer = batch.d.layer[l];
    const moestro_past &past = batch.pasts[part.sequence];
    const int64_t heads = heads_ / groups_, size = heads * width_, first = g * past.room[l];
    const int64_t place = past.place[l];
    memory.queries.resize(size_t(part.rows * size)), memory.mixed.resize(size_t(part.rows * size));
    for (int64_t i = 0; i < part.rows * heads; i++) {
        const float *from = qkv_.data() + (part.first + i / heads) * wide_ + (g * heads + i % heads) * step_;
        std::copy(from, from + width_, memory.queries.begin() + i * width_);
    }
    const int32_t dtype = batch.d.cache_dtype;
    const int64_t before = first * width_ * cache_bytes(dtype);
    const bool whole = dtype == MOESTRO_ROWS_INT8;
    const Past seen{static_cast<char *>(past.keys[l]) + before,
                    static_cast<char *>(past.values[l]) + before,
                    width_,
                    width_,
                    dtype,
                    whole ? past.key_scales[l] + first : nullptr,
                    whole ? past.value_scales[l] + first : nullptr};
    const Queries queries{memory.queries.data(),
                          part.rows,
                          heads,
                          width_,
                          width_,
                          place - past.kept[l],
                          place + part.before,
                          layer.window,
                          batch.d.score_scale,
                          layer.sinks ? layer.sinks + g * heads : nullptr};
    moestro::attend(queries, seen, memory.mixed.data(), memory.attention);
    for (int64_t i = 0; i < part.rows * heads; i++) {
        const int64_t t = part.first + i / heads, h = g * heads + i % heads;
        float *to = mixed_.data() + t * inner_ + h * width_;
        std::copy_n(memory.mixed.begin() + i * width_, width_, to);
        if (batch.d.gated) gate(to, qkv_.data() + t * wide_ + h * step_ + width_, width_, memory);
    }
}

bool GroupedAttention::run(Team &team, Batch &batch, int64_t l, Memory &memory) {
    const moestro_layer &layer = batch.d.layer[l];
    int64_t from, to;
    const bool room = team.once([&] {
        rows_.shape(layer.qkv.kind, layer.qkv.group, batch.t, batch.d.dim);
        inner_rows_.shape(layer.out.kind, layer.out.group, batch.t, inner_);
    });
    if (!room) return false;
    while (team.take(batch.t, 1, &from, &to))
        set(rows_, from, before_attention(batch, layer, from, memory), batch.d.dim, memory);
    team.wait(ahead_of(team, layer.qkv));
    multiply_all(team, layer.qkv, rows_, layer.qkv_bias, qkv_.data(), wide_);
    while (team.take(batch.t, 1, &from, &to)) place(batch, l, from);
    team.wait(ahead_of(team, layer.out));
    while (team.take(int64_t(parts_.size()) * groups_, 1, &from, &to))
        attend(batch, l, parts_[size_t(from / groups_)], from % groups_, memory);
    team.wait(ahead_of(team, layer.out));
    project(team, batch, layer, mixed_, inner_, inner_rows_, memory);
    return true;
}

}  // namespace moestro
