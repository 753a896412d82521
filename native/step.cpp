// One token through a whole decoder in one call: what bounds it is reading the weights, so nothing
// else may take time. Threads meet at the end of each phase; all sums run in one fixed order.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "mixture.h"

namespace moestro {
namespace {

struct Step {
    const moestro_decoder &d;
    const int64_t b;
    const float *cosines, *sines;
    const moestro_past *past;
    int64_t *experts;
    float *weights;

    std::vector<float> x, qkv, attended, update, logits_e;  // residual, projections, attention, update
    std::vector<int64_t> tokens, shared_tokens, zeros;
    std::vector<float> shared_weights;
    Prepared rows;
    Mixture routed, shared;

    int64_t qkv_width() const { return (d.heads + 2 * d.groups) * d.head_dim; }

    Step(const moestro_decoder &decoder, int64_t batch) : d(decoder), b(batch) {
        x.resize(size_t(b * d.dim));
        update.resize(size_t(b * d.dim));
        qkv.resize(size_t(b * qkv_width()));
        attended.resize(size_t(b * d.heads * d.head_dim));
        int64_t max_experts = 1;
        for (int64_t l = 0; l < d.layers; l++) max_experts = std::max(max_experts, d.layer[l].experts.experts);
        logits_e.resize(size_t(b * max_experts));
        for (int64_t t = 0; t < b; t++) {
            for (int64_t k = 0; k < d.top_k; k++) tokens.push_back(t);
            shared_tokens.push_back(t);
        }
        zeros.assign(size_t(b), 0);
        shared_weights.assign(size_t(b), 1.0f);
    }

    // x · gain / sqrt(mean(x²) + eps), zero from dim to `padded`.
    void norm(const float *from, const float *gain, int64_t dim, int64_t padded, float *to) const {
        const float scale = 1.0f / std::sqrt(kernels().dot(from, from, dim) / float(dim) + d.eps);
        for (int64_t i = 0; i < dim; i++) to[i] = (from[i] * scale) * gain[i];
        std::fill(to + dim, to + padded, 0.0f);
    }

    void rotate(float *head, const float *gain, int64_t t, std::vector<float> &scratch) const {
        const int64_t half = d.head_dim / 2;
        if (gain) {
            norm(head, gain, d.head_dim, d.head_dim, scratch.data());
            std::copy(scratch.begin(), scratch.begin() + d.head_dim, head);
        }
        const float *c = cosines + t * half, *s = sines + t * half;
        for (int64_t i = 0; i < half; i++) {
            const float first = head[i], second = head[i + half];
            head[i] = first * c[i] - second * s[i];
            head[i + half] = second * c[i] + first * s[i];
        }
    }

    // Rotate a group's key and its queries, store key and value, attend.
    template <class T> void attend(int64_t l, int64_t t, int64_t g, std::vector<float> &scratch) {
        const moestro_layer &layer = d.layer[l];
        const int64_t a = d.head_dim, each = d.heads / d.groups, place = past[t].place[l];
        const int64_t all = past[t].kept[l] + 1, seen = layer.window ? std::min(all, layer.window) : all,
                      first = place + 1 - seen;
        float *row = qkv.data() + t * qkv_width(), *key = row + (d.heads + g) * a, *value = key + d.groups * a;
        const int64_t group = g * past[t].room[l] * a;
        auto keys = static_cast<T *>(past[t].keys[l]) + group, values = static_cast<T *>(past[t].values[l]) + group;
        scratch.resize(size_t(std::max(seen, a)));
        rotate(key, layer.k_norm, t, scratch);
        store(key, keys + place * a, a);
        store(value, values + place * a, a);
        for (int64_t h = g * each; h < (g + 1) * each; h++) {
            float *query = row + h * a, *out = attended.data() + (t * d.heads + h) * a, max = -3e38f;
            rotate(query, layer.q_norm, t, scratch);
            const bool is_fp32 = std::is_same_v<T, float>;
            kernels().scores(query, keys + first * a, is_fp32, a, seen, a, d.score_scale, scratch.data());
            for (int64_t p = 0; p < seen; p++) max = std::max(max, scratch[size_t(p)]);
            if (layer.sinks) max = std::max(max, layer.sinks[h]);
            float sum = kernels().exponentials(scratch.data(), max, seen);
            if (layer.sinks) {
                float sink = layer.sinks[h];
                sum = sum + kernels().exponentials(&sink, max, 1);
            }
            for (int64_t p = 0; p < seen; p++) scratch[size_t(p)] /= sum;
            std::fill(out, out + a, 0.0f);
            kernels().mix(scratch.data(), values + first * a, is_fp32, a, seen, a, out);
        }
    }
    static void store(const float *from, float *to, int64_t n) { std::copy(from, from + n, to); }
    static void store(const float *from, uint16_t *to, int64_t n) {
        for (int64_t i = 0; i < n; i++) to[i] = to_bf16(from[i]);
    }

    static float sigmoid(float x) {
        float e = -x;
        kernels().exponentials(&e, 0.0f, 1);
        return 1.0f / (1.0f + e);
    }

    // Choose a token's experts: best first; equal scores, lower number first.
    void choose(const moestro_layer &layer, int64_t t, int64_t *to, float *weight) const {
        const int64_t count = layer.experts.experts;
        std::vector<float> scores(logits_e.begin() + t * count, logits_e.begin() + (t + 1) * count);
        const float max = *std::max_element(scores.begin(), scores.end());
        if (d.sigmoid)
            for (float &score : scores) score = sigmoid(score);
        else {
            const float sum = kernels().exponentials(scores.data(), max, count);
            for (float &score : scores) score = score / sum;
        }
        std::vector<float> ranked = scores;
        for (int64_t e = 0; layer.selection_bias && e < count; e++) ranked[size_t(e)] += layer.selection_bias[e];
        float sum = 0.0f;
        for (int64_t k = 0; k < d.top_k; k++) {
            const auto best = std::max_element(ranked.begin(), ranked.end());
            to[k] = best - ranked.begin();
            weight[k] = scores[size_t(to[k])];
            sum = sum + weight[k];
            *best = -INFINITY;
        }
        for (int64_t k = 0; k < d.top_k; k++)
            weight[k] = (d.renormalize ? weight[k] / sum : weight[k]) * d.router_scale;
    }

    void attention(Team &team, int64_t l, std::vector<float> &scratch) {
        const moestro_layer &layer = d.layer[l];
        int64_t from, to;
        if (team.take(1, 1, &from, &to)) rows.shape(layer.qkv.kind, layer.qkv.group, b, d.dim);
        team.wait();
        while (team.take(b, 1, &from, &to)) {
            scratch.resize(size_t(rows.rows.k));
            norm(x.data() + from * d.dim, layer.attention_norm, d.dim, rows.rows.k, scratch.data());
            rows.set(from, scratch.data());
        }
        team.wait();
        multiply_all(team, layer.qkv, rows, layer.qkv_bias, qkv.data(), qkv_width());
        while (team.take(b * d.groups, 1, &from, &to)) {
            if (d.cache_dtype == MOESTRO_ROWS_F32) attend<float>(l, from / d.groups, from % d.groups, scratch);
            else attend<uint16_t>(l, from / d.groups, from % d.groups, scratch);
        }
        team.wait();
        const int64_t inner = d.heads * d.head_dim;
        if (team.take(1, 1, &from, &to)) {
            rows.shape(layer.out.kind, layer.out.group, b, inner);
            scratch.assign(size_t(rows.rows.k), 0.0f);
            for (int64_t t = 0; t < b; t++) {
                std::copy(attended.begin() + t * inner, attended.begin() + (t + 1) * inner, scratch.begin());
                rows.set(t, scratch.data());
            }
        }
        team.wait();
        multiply_all(team, layer.out, rows, layer.out_bias, update.data(), d.dim);
    }

    void feed_forward(Team &team, int64_t l, std::vector<float> &scratch) {
        const moestro_layer &layer = d.layer[l];
        int64_t from, to, *chosen = experts + l * b * d.top_k;
        float *given = weights + l * b * d.top_k;
        const bool mixture = layer.router != nullptr;
        const int64_t count = layer.experts.experts;
        // Every thread norms for itself what it routes; the sum with the residual is done once.
        while (team.take(b, 1, &from, &to))
            kernels().add(1.0f, update.data() + from * d.dim, x.data() + from * d.dim, d.dim);
        team.wait();
        std::vector<float> normed(size_t(b * d.dim));
        for (int64_t t = 0; t < b; t++)
            norm(x.data() + t * d.dim, layer.ffn_norm, d.dim, d.dim, normed.data() + t * d.dim);
        while (mixture && team.take(b * count, 4, &from, &to))
            for (; from < to; from++)
                logits_e[size_t(from)] =
                    kernels().dot(normed.data() + from / count * d.dim, layer.router + from % count * d.dim, d.dim) +
                    (layer.logit_bias ? layer.logit_bias[from % count] : 0.0f);
        team.wait();
        if (team.take(1, 1, &from, &to)) {
            for (int64_t t = 0; mixture && t < b; t++) choose(layer, t, chosen + t * d.top_k, given + t * d.top_k);
            prepare(routed, layer.experts, mixture ? tokens : shared_tokens, mixture ? chosen : zeros.data(), normed,
                    scratch);
            if (layer.shared.data) prepare(shared, layer.shared, shared_tokens, zeros.data(), normed, scratch);
            for (int64_t t = 0; layer.shared_gate && t < b; t++)
                shared_weights[size_t(t)] = sigmoid(kernels().dot(normed.data() + t * d.dim, layer.shared_gate, d.dim));
        }
        team.wait();
        routed.compute(team);
        if (layer.shared.data) shared.compute(team);
        while (team.take(b, 1, &from, &to)) {
            routed.add(from, mixture ? given : ones(), x.data() + from * d.dim);
            if (layer.shared.data)
                shared.add(from, layer.shared_gate ? shared_weights.data() : ones(), x.data() + from * d.dim);
        }
        team.wait();
    }

    const float *ones() const { return ones_.data(); }
    std::vector<float> ones_;

    void prepare(Mixture &mixture, const moestro_experts &w, const std::vector<int64_t> &of, const int64_t *chosen,
                 const std::vector<float> &normed, std::vector<float> &scratch) const {
        mixture.plan(w, of.data(), chosen, int64_t(of.size()));
        scratch.assign(size_t(std::max(mixture.padded(), d.dim)), 0.0f);
        for (size_t a = 0; a < of.size(); a++) {
            const float *row = normed.data() + of[a] * d.dim;
            std::copy(row, row + d.dim, scratch.begin());
            mixture.set(int64_t(a), scratch.data());
        }
    }

    void predict(Team &team, float *logits, std::vector<float> &scratch) {
        int64_t from, to;
        if (team.take(1, 1, &from, &to)) {
            rows.shape(d.head.kind, d.head.group, b, d.dim);
            scratch.resize(size_t(rows.rows.k));
            for (int64_t t = 0; t < b; t++) {
                norm(x.data() + t * d.dim, d.norm, d.dim, rows.rows.k, scratch.data());
                for (int64_t i = 0; i < d.dim; i++) scratch[size_t(i)] *= d.head_scale;
                rows.set(t, scratch.data());
            }
        }
        team.wait();
        multiply_all(team, d.head, rows, d.head_bias, logits, d.vocab);
    }
};

bool has_shape(const moestro_matrix &w, int64_t n, int64_t k) { return valid(w) && w.n == n && w.k == k; }

bool valid_layer(const moestro_layer &layer, const moestro_decoder &d) {
    const int64_t inner = d.heads * d.head_dim, width = inner + 2 * d.groups * d.head_dim,
                  count = layer.experts.experts;
    const bool shared =
        !layer.shared.data || (valid(layer.shared) && layer.shared.experts == 1 && layer.shared.dim == d.dim);
    return layer.attention_norm && layer.ffn_norm && has_shape(layer.qkv, width, d.dim) &&
           has_shape(layer.out, d.dim, inner) && layer.window >= 0 && valid(layer.experts) &&
           layer.experts.dim == d.dim && (layer.router ? d.top_k >= 1 && d.top_k <= count : count == 1) && shared;
}

bool valid_decoder(const moestro_decoder *d, int64_t b) {
    if (!d || !d->layer || d->layers < 1 || b < 1 || d->groups < 1 || d->heads < 1 || d->heads % d->groups)
        return false;
    if (d->head_dim < 2 || d->head_dim % 2 || d->top_k < 0 || !d->norm || !has_shape(d->head, d->vocab, d->dim) ||
        !valid_rows(d->cache_dtype))
        return false;
    return std::all_of(d->layer, d->layer + d->layers,
                       [d](const moestro_layer &layer) { return valid_layer(layer, *d); });
}

}  // namespace
}  // namespace moestro

using namespace moestro;

extern "C" int32_t moestro_step(const moestro_decoder *d, int64_t b, const float *x, const float *cosines,
                                const float *sines, const moestro_past *past, float *logits, int64_t *experts,
                                float *weights) {
    if (!valid_decoder(d, b) || !x || !cosines || !sines || !past || !logits) return MOESTRO_EBAD;
    for (int64_t t = 0; t < b; t++)
        for (int64_t l = 0; l < d->layers; l++)
            if (past[t].kept[l] < 0 || past[t].place[l] < past[t].kept[l] || past[t].place[l] >= past[t].room[l])
                return MOESTRO_EBAD;
    Lock lock(one_at_a_time());
    try {
        Step step(*d, b);
        step.cosines = cosines, step.sines = sines, step.past = past, step.experts = experts, step.weights = weights;
        step.ones_.assign(size_t(b), 1.0f);
        std::copy(x, x + b * d->dim, step.x.begin());
        run(INT32_MAX, [&](Team &team, int) {
            std::vector<float> scratch;
            for (int64_t l = 0; l < d->layers; l++) {
                step.attention(team, l, scratch);
                step.feed_forward(team, l, scratch);
            }
            step.predict(team, logits, scratch);
        });
    } catch (const std::bad_alloc &) {
        return MOESTRO_EMEMORY;
    }
    return 0;
}
