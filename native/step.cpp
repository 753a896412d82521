// Tokens of several sequences through a whole decoder in one call: what bounds a single one is reading the weights, so
// nothing else may take time. Threads meet at the end of each phase; all sums run in one fixed order, and no row
// depends on another, so a prompt may come in any pieces, beside any others.
#include <algorithm>
#include <functional>
#include <vector>

#include "layers.h"

namespace moestro {
namespace {

constexpr int64_t ROUTED = 16;         // tokens whose router scores are one task
constexpr int64_t FEW = 4, SOME = 32;  // experts of that task: for a single token, for many

class Step {
public:
    // Throws std::bad_alloc.
    void plan(const moestro_decoder &decoder, int64_t b, const moestro_past *pasts);
    // False, to all threads alike: experts could not be read, or there is not enough memory.
    bool run(Team &team, float *logits, Memory &memory);
    void give_up() { routed_.give_up(); }

    Batch batch;
    int64_t *experts;
    float *weights;

private:
    bool attention(Team &team, int64_t l, Memory &memory);
    bool feed_forward(Team &team, int64_t l, Memory &memory);
    void route(Team &team, const moestro_layer &layer, int64_t *chosen, float *given);
    void choose(const moestro_layer &layer, int64_t t, int64_t *to, float *weight) const;
    bool mix(Team &team, const moestro_layer &layer, const int64_t *chosen, const float *given);
    bool predict(Team &team, float *logits, Memory &memory);
    void limit_groups(std::vector<float> &wanted) const;
    void choose_among_rivals(const float *logits, int64_t count, int64_t *to, float *weight) const;
    void scale_weights(float *weight) const;

    moestro_decoder d_{};
    int64_t t_ = 0;  // tokens
    GroupedAttention grouped_;
    LatentAttention latent_;
    DeltaNet delta_;
    std::vector<float> normed_, scores_, ones_, shared_weights_;
    std::vector<int64_t> assigned_, tokens_, zeros_;
    Prepared rows_, expert_rows_, shared_rows_;
    Mixture routed_, shared_;
};

void Step::plan(const moestro_decoder &decoder, int64_t b, const moestro_past *pasts) {
    batch.plan(decoder, b, pasts);
    routed_.forget();
    grouped_.plan(batch);
    latent_.plan(batch);
    delta_.plan(batch);
    d_ = decoder, t_ = batch.t;
    assigned_.clear(), tokens_.clear();
    int64_t most = 1;
    for (int64_t l = 0; l < d_.layers; l++) most = std::max(most, d_.layer[l].experts.experts);
    for (int64_t t = 0; t < t_; t++) {
        for (int64_t k = 0; k < d_.top_k; k++) assigned_.push_back(t);
        tokens_.push_back(t);
    }
    const int64_t all = t_ * d_.top_k;
    for (int64_t l = 0; l < d_.layers; l++) {
        if (d_.layer[l].router) continue;
        std::fill_n(experts + l * all, all, int64_t(-1)), std::fill_n(weights + l * all, all, 0.0f);
    }
    normed_.resize(size_t(t_ * d_.dim)), scores_.resize(size_t(t_ * most));
    zeros_.assign(size_t(t_), 0), ones_.assign(size_t(t_), 1.0f), shared_weights_.assign(size_t(t_), 1.0f);
}

// Leave only the experts of the best groups.
void Step::limit_groups(std::vector<float> &wanted) const {
    const auto size = int64_t(wanted.size()) / d_.expert_groups;
    std::vector<float> group(wanted), worth(size_t(d_.expert_groups), 0.0f);
    for (int64_t g = 0; g < d_.expert_groups; g++) {
        const auto begin = group.begin() + g * size;
        std::partial_sort(begin, begin + d_.group_best, begin + size, std::greater<float>());
        for (int64_t i = 0; i < d_.group_best; i++) worth[size_t(g)] = worth[size_t(g)] + begin[i];
    }
    std::vector<bool> kept(worth.size());
    for (int64_t i = 0; i < d_.top_groups; i++) {
        const auto best = std::max_element(worth.begin(), worth.end());
        kept[size_t(best - worth.begin())] = true;
        *best = -INFINITY;
    }
    for (size_t e = 0; e < wanted.size(); e++)
        if (!kept[e / size_t(size)]) wanted[e] = -INFINITY;
}

// sparsemixer: an expert's weight is its share of a softmax over those that are near it and not chosen before.
void Step::choose_among_rivals(const float *logits, int64_t count, int64_t *to, float *weight) const {
    std::vector<float> open(logits, logits + count), near(static_cast<size_t>(count));
    for (int64_t k = 0; k < d_.top_k; k++) {
        const auto best = std::max_element(open.begin(), open.end());
        const float most = *best;
        for (int64_t e = 0; e < count; e++) {
            const float reach = d_.rivals * std::max(std::fabs(logits[e]), most);
            near[size_t(e)] = most - logits[e] > reach ? -INFINITY : open[size_t(e)];
        }
        to[k] = best - open.begin();
        weight[k] = 1.0f / kernels().exponentials(near.data(), most, count);
        *best = -INFINITY;
    }
    scale_weights(weight);
}

void Step::scale_weights(float *weight) const {
    float sum = 0.0f;
    for (int64_t k = 0; k < d_.top_k; k++) sum = sum + weight[k];
    for (int64_t k = 0; k < d_.top_k; k++) weight[k] = (d_.renormalize ? weight[k] / sum : weight[k]) * d_.router_scale;
}

// Choose a token's experts: best first; equal scores, lower number first.
void Step::choose(const moestro_layer &layer, int64_t t, int64_t *to, float *weight) const {
    const int64_t count = layer.experts.experts;
    if (d_.rivals > 0.0f) return choose_among_rivals(scores_.data() + t * count, count, to, weight);
    std::vector<float> scores(scores_.begin() + t * count, scores_.begin() + (t + 1) * count);
    const float most = *std::max_element(scores.begin(), scores.end());
    if (d_.sigmoid)
        for (float &score : scores) score = sigmoid(score);
    else {
        const float sum = kernels().exponentials(scores.data(), most, count);
        for (float &score : scores) score = score / sum;
    }
    std::vector<float> wanted = scores;
    for (int64_t e = 0; layer.selection_bias && e < count; e++) wanted[size_t(e)] += layer.selection_bias[e];
    if (d_.expert_groups > 1) limit_groups(wanted);
    for (int64_t k = 0; k < d_.top_k; k++) {
        const auto best = std::max_element(wanted.begin(), wanted.end());
        to[k] = best - wanted.begin();
        weight[k] = scores[size_t(to[k])];
        *best = -INFINITY;
    }
    scale_weights(weight);
}

// Every token's experts and their weights.
void Step::route(Team &team, const moestro_layer &layer, int64_t *chosen, float *given) {
    const int64_t count = layer.experts.experts, some = t_ == 1 ? FEW : SOME;
    const int64_t across = (count + some - 1) / some, tasks = (t_ + ROUTED - 1) / ROUTED * across;
    int64_t from, to;
    while (team.take(tasks, 1, &from, &to)) {
        const int64_t t = from / across * ROUTED, e = from % across * some;
        const int64_t tokens = std::min(ROUTED, t_ - t), experts = std::min(some, count - e);
        float *scores = scores_.data() + t * count + e;
        kernels().scores(normed_.data() + t * d_.dim, layer.router + e * d_.dim, true,
                         {tokens, experts, d_.dim, d_.dim, count, 1.0f}, scores,
                         thread_buffer().get<uint32_t>(d_.dim * COLUMNS));
        for (int64_t i = 0; layer.logit_bias && i < tokens; i++)
            for (int64_t j = 0; j < experts; j++) scores[i * count + j] += layer.logit_bias[e + j];
    }
    team.wait();
    while (team.take(t_, 4, &from, &to))
        for (; from < to; from++) choose(layer, from, chosen + from * d_.top_k, given + from * d_.top_k);
    team.wait();
}

// x += what the experts make of the normed rows.
bool Step::mix(Team &team, const moestro_layer &layer, const int64_t *chosen, const float *given) {
    const bool shared = layer.shared.data != nullptr;
    const std::vector<int64_t> &assigned = layer.router ? assigned_ : tokens_;
    const bool room = team.once([&] {
        routed_.plan(layer.experts, assigned.data(), chosen, int64_t(assigned.size()));
        if (shared) shared_.plan(layer.shared, tokens_.data(), zeros_.data(), t_);
    });
    if (!room) return false;
    int64_t from, to;
    while (team.take(int64_t(assigned.size()), 4, &from, &to))
        for (; from < to; from++) routed_.set(from, expert_rows_);
    team.wait(routed_.ahead(team));
    while (shared && team.take(t_, 4, &from, &to))
        for (; from < to; from++) shared_.set(from, shared_rows_);
    team.wait();
    if (shared) shared_.compute(team);  // while experts that are not in memory are read
    if (!routed_.compute(team)) return false;
    const float *ones = ones_.data(), *shares = layer.shared_gate ? shared_weights_.data() : ones;
    while (team.take(t_, 1, &from, &to)) {
        routed_.add(from, layer.router ? given : ones, batch.x.data() + from * d_.dim);
        if (shared) shared_.add(from, shares, batch.x.data() + from * d_.dim);
    }
    team.wait();
    return true;
}

bool Step::feed_forward(Team &team, int64_t l, Memory &memory) {
    const moestro_layer &layer = d_.layer[l];
    int64_t from, to, *chosen = experts + l * t_ * d_.top_k;
    float *given = weights + l * t_ * d_.top_k;
    const bool room = team.once([&] {
        expert_rows_.shape(layer.experts.kind, layer.experts.group, t_, d_.dim);
        if (layer.shared.data) shared_rows_.shape(layer.shared.kind, layer.shared.group, t_, d_.dim);
    });
    if (!room) return false;
    while (team.take(t_, 1, &from, &to)) {
        float *row = batch.x.data() + from * d_.dim, *normed = normed_.data() + from * d_.dim;
        kernels().add(1.0f, batch.added.data() + from * d_.dim, row, d_.dim);
        norm(row, layer.ffn_norm, layer.ffn_norm_bias, d_.dim, d_.eps, normed);
        set(expert_rows_, from, normed, d_.dim, memory);
        if (layer.shared.data) set(shared_rows_, from, normed, d_.dim, memory);
        if (layer.shared_gate)
            shared_weights_[size_t(from)] = sigmoid(kernels().dot(normed, layer.shared_gate, d_.dim));
    }
    const int64_t scored = layer.router ? layer.experts.experts * d_.dim * 4 : 0;
    team.wait({layer.router, std::min(scored, Blocks::MOST_AHEAD)});
    if (layer.router) route(team, layer, chosen, given);
    return mix(team, layer, layer.router ? chosen : zeros_.data(), given);
}

bool Step::predict(Team &team, float *logits, Memory &memory) {
    const auto count = int64_t(batch.told.size());
    if (!team.once([&] { rows_.shape(d_.head.kind, d_.head.group, count, d_.dim); })) return false;
    int64_t from, to;
    while (team.take(count, 1, &from, &to)) {
        float *row = normed_.data() + from * d_.dim;
        norm(batch.residual(batch.told[size_t(from)]), d_.norm, d_.norm_bias, d_.dim, d_.eps, row);
        for (int64_t i = 0; i < d_.dim; i++) row[i] *= d_.head_scale;
        set(rows_, from, row, d_.dim, memory);
    }
    team.wait(ahead_of(team, d_.head));
    multiply_all(team, d_.head, rows_, d_.head_bias, logits, d_.vocab);
    return true;
}

bool Step::attention(Team &team, int64_t l, Memory &memory) {
    if (d_.layer[l].latent) return latent_.run(team, batch, l, memory);
    return d_.layer[l].delta ? delta_.run(team, batch, l, memory) : grouped_.run(team, batch, l, memory);
}

bool Step::run(Team &team, float *logits, Memory &memory) {
    for (int64_t l = 0; l < d_.layers; l++) {
        if (!attention(team, l, memory) || !feed_forward(team, l, memory)) return false;
    }
    return predict(team, logits, memory);
}

// Whether a router can choose of so many experts.
bool good(const moestro_decoder &d, int64_t count) {
    const int64_t groups = d.expert_groups;
    if (groups < 1 || count % groups || d.top_groups < 1 || d.top_groups > groups) return false;
    if (d.group_best < 1 || d.group_best > count / groups) return false;
    return d.top_k >= 1 && d.top_k <= count / groups * d.top_groups;
}

// What looks back.
bool good_attention(const moestro_layer &layer, const moestro_decoder &d) {
    if (layer.latent) return !layer.delta && LatentAttention::good(layer, d);
    return layer.delta ? DeltaNet::good(layer, d) : GroupedAttention::good(layer, d);
}

bool good(const moestro_layer &layer, const moestro_decoder &d) {
    const int64_t count = layer.experts.experts;
    const bool shared =
        !layer.shared.data || (valid(layer.shared) && layer.shared.experts == 1 && layer.shared.dim == d.dim);
    return layer.attention_norm && layer.ffn_norm && good_attention(layer, d) && layer.window >= 0 &&
           usable(layer.experts) && layer.experts.dim == d.dim && (layer.router ? good(d, count) : count == 1) &&
           shared;
}

bool good_cache(const moestro_decoder &d) {
    return valid_rows(d.cache_dtype) || (d.cache_dtype == MOESTRO_ROWS_INT8 && d.head_dim <= WIDEST_WHOLE);
}

bool good(const moestro_decoder *d, int64_t b) {
    if (!d || !d->layer || d->layers < 1 || b < 1 || d->groups < 1 || d->heads < 1 || d->heads % d->groups)
        return false;
    if (d->turning < 2 || d->turning % 2 || d->turning > d->head_dim || d->top_k < 0 || !d->norm ||
        !is(d->head, d->vocab, d->dim) || !good_cache(*d))
        return false;
    return std::all_of(d->layer, d->layer + d->layers, [d](const moestro_layer &layer) { return good(layer, *d); });
}

}  // namespace
}  // namespace moestro

using namespace moestro;

extern "C" int32_t moestro_step(const moestro_decoder *d, int64_t b, const float *x, const float *cosines,
                                const float *sines, const moestro_past *past, float *logits, int64_t *experts,
                                float *weights) {
    if (!good(d, b) || !x || !cosines || !sines || !past || !logits) return MOESTRO_EBAD;
    for (int64_t s = 0; s < b; s++) {
        if (past[s].rows < 1 || past[s].rows > INT32_MAX || past[s].told < 1 || past[s].told > past[s].rows)
            return MOESTRO_EBAD;
        if (d->cache_dtype == MOESTRO_ROWS_INT8 && (!past[s].key_scales || !past[s].value_scales)) return MOESTRO_EBAD;
        for (int64_t l = 0; l < d->layers; l++)
            if (past[s].kept[l] < 0 || past[s].place[l] < past[s].kept[l] ||
                past[s].place[l] > past[s].room[l] - past[s].rows)
                return MOESTRO_EBAD;
    }
    Lock lock(one_at_a_time());
    // Never destroyed: a thread may still compute when the process ends.
    static Step &step = *new Step;
    std::atomic<bool> whole{true}, room{true};
    try {
        step.experts = experts, step.weights = weights;
        step.plan(*d, b, past);
        step.batch.cosines = cosines, step.batch.sines = sines;
        std::copy(x, x + int64_t(step.batch.x.size()), step.batch.x.begin());
        run(INT32_MAX, [&](Team &team, int) {
            static thread_local Memory memory;
            if (!step.run(team, logits, memory)) whole.store(false);
            if (team.out_of_memory()) room.store(false);
        });
    } catch (const std::bad_alloc &) {
        return MOESTRO_EMEMORY;
    }
    if (whole) return 0;
    step.give_up();
    return room ? MOESTRO_EREAD : MOESTRO_EMEMORY;
}
