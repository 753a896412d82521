// Multi-head latent attention (DeepSeek-V2 2024, §2.1.2) with nothing computed of each position's keys and values:
// queries go down to the width of the latent vectors, which are keys and values of all heads, and results come up.
// Letters: R the latent width, N and A a head's widths without and with positions, O of its values.
#include <algorithm>

#include "layers.h"

namespace moestro {
namespace {

constexpr int64_t HEADS = 8, QUERIES = 32;  // heads of a task; about as many queries attend together
constexpr int64_t ROWS = 32;                // tokens whose queries go down, or results up, together

float *scales(const moestro_decoder &d, const moestro_past &past, int64_t l) {
    return d.cache_dtype == MOESTRO_ROWS_INT8 ? past.key_scales[l] : nullptr;
}

}  // namespace

bool LatentAttention::good(const moestro_layer &layer, const moestro_decoder &d) {
    const moestro_latent &w = *layer.latent;
    if (w.q_rank < 0 || w.kv_rank < 1 || w.nope < 1 || w.value < 1 || !w.kv_norm || !w.kv_up) return false;
    const int64_t queries = d.heads * (w.nope + d.turning);
    const bool ranks =
        w.q_rank ? w.q_norm && is(w.q_down, w.q_rank, d.dim) && is(w.q, queries, w.q_rank) : is(w.q, queries, d.dim);
    return ranks && valid_rows(w.kv_up_dtype) && d.groups == 1 && d.head_dim == w.kv_rank + d.turning &&
           is(w.kv_down, d.head_dim, d.dim) && is(layer.out, d.dim, d.heads * w.value);
}

void LatentAttention::plan(const Batch &batch) {
    const moestro_decoder &d = batch.d;
    parts_.clear();
    for (int64_t l = 0; l < d.layers; l++) {
        if (!d.layer[l].latent) continue;
        const moestro_latent &w = *d.layer[l].latent;
        parts_ = batch.parts(std::max(int64_t(1), QUERIES / std::min(HEADS, d.heads)));
        grow(low_, batch.t, w.q_rank);
        grow(queries_, batch.t, d.heads * (w.nope + d.turning));
        grow(kept_, batch.t, d.head_dim);
        grow(down_, batch.t, d.heads * d.head_dim);
        grow(mixed_, batch.t, d.heads * w.kv_rank);
        grow(values_, batch.t, d.heads * w.value);
    }
}

// Norm a token's latent vector, turn its key, and write both where its sequence keeps them; turn its queries.
void LatentAttention::place(const Batch &batch, const moestro_latent &w, int64_t l, int64_t t) {
    const moestro_decoder &d = batch.d;
    const moestro_past &past = batch.pasts[batch.sequence[size_t(t)]];
    float *kept = kept_.data() + t * d.head_dim;
    norm(kept, w.kv_norm, nullptr, w.kv_rank, w.eps, kept);
    batch.turn(kept + w.kv_rank, t);
    keep(kept, d.cache_dtype, past.keys[l], scales(d, past, l), batch.position(t, l), d.head_dim);
    const int64_t width = w.nope + d.turning;
    for (int64_t h = 0; h < d.heads; h++) batch.turn(queries_.data() + (t * d.heads + h) * width + w.nope, t);
}

// Some tokens' queries of a head, as the latent vectors are looked at: its keys' matrix transposed times their part
// without positions, then their other part.
void LatentAttention::lower(const Batch &batch, const moestro_latent &w, int64_t t, int64_t count, int64_t h,
                            Memory &memory) {
    const moestro_decoder &d = batch.d;
    const int64_t width = w.nope + d.turning, apart = d.heads * width;
    const float *queries = queries_.data() + t * apart + h * width;
    memory.mixed.assign(size_t(count * w.kv_rank), 0.0f);
    kernels().mix(queries, up(w, h * (w.nope + w.value)), w.kv_up_dtype, {count, w.nope, w.kv_rank, w.kv_rank, apart},
                  memory.mixed.data());
    for (int64_t i = 0; i < count; i++) {
        float *to = down_.data() + ((t + i) * d.heads + h) * d.head_dim;
        std::copy(memory.mixed.begin() + i * w.kv_rank, memory.mixed.begin() + (i + 1) * w.kv_rank, to);
        const float *turned = queries + i * apart + w.nope;
        std::copy(turned, turned + d.turning, to + w.kv_rank);
    }
}

// What some tokens' queries of a head have mixed of latent vectors, times its values' matrix.
void LatentAttention::raise(const Batch &batch, const moestro_latent &w, int64_t t, int64_t count, int64_t h,
                            Memory &memory) {
    const int64_t heads = batch.d.heads;
    memory.mixed.resize(size_t(count * w.kv_rank));
    for (int64_t i = 0; i < count; i++) {
        const float *from = mixed_.data() + ((t + i) * heads + h) * w.kv_rank;
        std::copy(from, from + w.kv_rank, memory.mixed.begin() + i * w.kv_rank);
    }
    kernels().scores(memory.mixed.data(), up(w, h * (w.nope + w.value) + w.nope), w.kv_up_dtype == MOESTRO_ROWS_F32,
                     {count, w.value, w.kv_rank, w.kv_rank, heads * w.value, 1.0f},
                     values_.data() + (t * heads + h) * w.value,
                     memory.attention.columns.get<uint32_t>(w.kv_rank * COLUMNS));
}

void LatentAttention::attend(const Batch &batch, const moestro_latent &w, int64_t l, const Part &part, int64_t first,
                             Memory &memory) {
    const moestro_decoder &d = batch.d;
    const moestro_past &past = batch.pasts[part.sequence];
    const int64_t heads = std::min(HEADS, d.heads - first), size = heads * d.head_dim, mixed = heads * w.kv_rank;
    memory.queries.resize(size_t(part.rows * size)), memory.mixed.resize(size_t(part.rows * mixed));
    for (int64_t r = 0; r < part.rows; r++) {
        const float *from = down_.data() + ((part.first + r) * d.heads + first) * d.head_dim;
        std::copy(from, from + size, memory.queries.begin() + r * size);
    }
    const float *theirs = scales(d, past, l);
    const Past seen{past.keys[l], past.keys[l], d.head_dim, d.head_dim, d.cache_dtype, theirs, theirs};
    const int64_t place = past.place[l];
    const Queries queries{
        memory.queries.data(), part.rows,         heads,         d.head_dim, w.kv_rank, place - past.kept[l],
        place + part.before,   d.layer[l].window, d.score_scale, nullptr};
    moestro::attend(queries, seen, memory.mixed.data(), memory.attention);
    for (int64_t r = 0; r < part.rows; r++)
        std::copy(memory.mixed.begin() + r * mixed, memory.mixed.begin() + (r + 1) * mixed,
                  mixed_.begin() + ((part.first + r) * d.heads + first) * w.kv_rank);
}

bool LatentAttention::run(Team &team, Batch &batch, int64_t l, Memory &memory) {
    const moestro_decoder &d = batch.d;
    const moestro_layer &layer = d.layer[l];
    const moestro_latent &w = *layer.latent;
    const moestro_matrix &first = w.q_rank ? w.q_down : w.q;
    const int64_t blocks = (batch.t + ROWS - 1) / ROWS, across = (d.heads + HEADS - 1) / HEADS;
    int64_t from, to;
    const bool room = team.once([&] {
        rows_.shape(first.kind, first.group, batch.t, d.dim);
        kv_rows_.shape(w.kv_down.kind, w.kv_down.group, batch.t, d.dim);
        if (w.q_rank) low_rows_.shape(w.q.kind, w.q.group, batch.t, w.q_rank);
        out_rows_.shape(layer.out.kind, layer.out.group, batch.t, d.heads * w.value);
    });
    if (!room) return false;
    while (team.take(batch.t, 1, &from, &to)) {
        const float *row = before_attention(batch, layer, from, memory);
        set(rows_, from, row, d.dim, memory);
        set(kv_rows_, from, row, d.dim, memory);
    }
    team.wait();
    multiply_all(team, w.kv_down, kv_rows_, nullptr, kept_.data(), d.head_dim);
    if (w.q_rank) {
        multiply_all(team, first, rows_, nullptr, low_.data(), w.q_rank);
        while (team.take(batch.t, 1, &from, &to)) {
            float *row = low_.data() + from * w.q_rank;
            norm(row, w.q_norm, nullptr, w.q_rank, w.eps, row);
            set(low_rows_, from, row, w.q_rank, memory);
        }
        team.wait();
    }
    multiply_all(team, w.q, w.q_rank ? low_rows_ : rows_, nullptr, queries_.data(), w.q.n);
    while (team.take(batch.t, 1, &from, &to)) place(batch, w, l, from);
    team.wait();
    while (team.take(blocks * d.heads, 1, &from, &to)) {
        const int64_t t = from / d.heads * ROWS;
        lower(batch, w, t, std::min(ROWS, batch.t - t), from % d.heads, memory);
    }
    team.wait();
    while (team.take(int64_t(parts_.size()) * across, 1, &from, &to))
        attend(batch, w, l, parts_[size_t(from / across)], from % across * HEADS, memory);
    team.wait();
    while (team.take(blocks * d.heads, 1, &from, &to)) {
        const int64_t t = from / d.heads * ROWS;
        raise(batch, w, t, std::min(ROWS, batch.t - t), from % d.heads, memory);
    }
    team.wait();
    project(team, batch, layer, values_, d.heads * w.value, out_rows_, memory);
    return true;
}

}  // namespace moestro
