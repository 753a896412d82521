// Gated DeltaNet (Yang, Kautz and Hatamizadeh 2024) as in Qwen3-Next: a short convolution, the gated delta rule, a
// gated norm. A sequence's state is carried from token to token in their order, so it may come in any pieces.
// Letters: G key heads, H value heads, A and O widths of a key and of a value, W of the convolution, I its channels.
#include <algorithm>

#include "layers.h"

namespace moestro {
namespace {

int64_t channels(const moestro_delta &w) { return 2 * w.key_heads * w.key_dim + w.value_heads * w.value_dim; }
int64_t projected(const moestro_delta &w) { return channels(w) + w.value_heads * w.value_dim; }

float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

// To length `length`.
void unit(float *x, int64_t n, float eps, float length) {
    const float scale = length / std::sqrt(kernels().dot(x, x, n) + eps);
    for (int64_t i = 0; i < n; i++) x[i] = x[i] * scale;
}

}  // namespace

bool DeltaNet::good(const moestro_layer &layer, const moestro_decoder &d) {
    const moestro_delta &w = *layer.delta;
    const bool sizes = w.key_heads >= 1 && w.value_heads >= 1 && w.value_heads % w.key_heads == 0 && w.key_dim >= 1 &&
                       w.value_dim >= 1 && w.conv_width >= 1;
    return sizes && w.ba && w.conv && w.rate && w.time_bias && w.gain && is(w.qkvz, projected(w), d.dim) &&
           is(layer.out, d.dim, w.value_heads * w.value_dim);
}

void DeltaNet::plan(const Batch &batch) {
    first_.assign(1, 0);
    for (int64_t s = 0; s < batch.b; s++) first_.push_back(first_.back() + batch.pasts[s].rows);
    for (int64_t l = 0; l < batch.d.layers; l++) {
        if (!batch.d.layer[l].delta) continue;
        const moestro_delta &w = *batch.d.layer[l].delta;
        grow(projected_, batch.t, projected(w));
        grow(convolved_, batch.t, channels(w));
        grow(ba_, batch.t, 2 * w.value_heads);
        grow(mixed_, batch.t, w.value_heads * w.value_dim);
    }
}

// A token's sum of each channel's last W numbers by their weights, then SiLU; queries and keys to their lengths.
void DeltaNet::convolve(const Batch &batch, const moestro_delta &w, int64_t l, int64_t t, Memory &memory) {
    const int64_t width = channels(w), wide = projected(w), before = batch.offset[size_t(t)];
    const auto inputs = static_cast<const float *>(batch.pasts[batch.sequence[size_t(t)]].keys[l]);
    float *to = convolved_.data() + t * width;
    std::fill(to, to + width, 0.0f);
    for (int64_t i = 0; i < w.conv_width; i++) {
        const int64_t back = w.conv_width - 1 - i;
        const float *from = back <= before ? projected_.data() + (t - back) * wide
                                           : inputs + (w.conv_width - 1 + before - back) * width;
        const float *weights = w.conv + i * width;
        for (int64_t c = 0; c < width; c++) to[c] = to[c] + weights[c] * from[c];
    }
    gate(to, to, width, memory);
    for (int64_t g = 0; g < w.key_heads; g++) {
        unit(to + g * w.key_dim, w.key_dim, w.length_eps, 1.0f / std::sqrt(float(w.key_dim)));
        unit(to + (w.key_heads + g) * w.key_dim, w.key_dim, w.length_eps, 1.0f);
    }
}

// The tokens of a sequence through the state [A, O] of a head, then the gated norm:
// S = α S + k (β (v − α Sᵀ k))ᵀ, y = Sᵀ q.
void DeltaNet::carry(const Batch &batch, const moestro_delta &w, int64_t l, int64_t s, int64_t h, Memory &memory) {
    const int64_t a = w.key_dim, o = w.value_dim, width = channels(w), keys = w.key_heads * a;
    const int64_t g = h / (w.value_heads / w.key_heads);
    float *state = static_cast<float *>(batch.pasts[s].values[l]) + h * a * o;
    memory.normed.resize(size_t(o));
    float *change = memory.normed.data();
    for (int64_t t = first_[size_t(s)]; t < first_[size_t(s) + 1]; t++) {
        const float *row = convolved_.data() + t * width, *key = row + keys + g * a, *value = row + 2 * keys + h * o;
        const float *ba = ba_.data() + t * 2 * w.value_heads;
        const float beta = sigmoid(ba[h]);
        const float decay = std::exp(-(w.rate[h] * softplus(ba[w.value_heads + h] + w.time_bias[h])));
        std::fill(change, change + o, 0.0f);
        kernels().mix(key, state, MOESTRO_ROWS_F32, {1, a, o, o, a}, change);
        for (int64_t i = 0; i < o; i++) change[i] = beta * (value[i] - decay * change[i]);
        for (int64_t i = 0; i < a; i++)
            for (int64_t j = 0; j < o; j++) state[i * o + j] = decay * state[i * o + j] + key[i] * change[j];
        float *out = mixed_.data() + (t * w.value_heads + h) * o;
        std::fill(out, out + o, 0.0f);
        kernels().mix(row + g * a, state, MOESTRO_ROWS_F32, {1, a, o, o, a}, out);
        norm(out, w.gain, nullptr, o, w.eps, out);
        std::copy_n(projected_.data() + t * projected(w) + width + h * o, o, change);
        gate(change, change, o, memory);
        for (int64_t i = 0; i < o; i++) out[i] = out[i] * change[i];
    }
}

// The inputs that the convolution of the next tokens sees.
void DeltaNet::remember(const Batch &batch, const moestro_delta &w, int64_t l, int64_t s) {
    const int64_t kept = w.conv_width - 1, width = channels(w), rows = batch.pasts[s].rows;
    auto inputs = static_cast<float *>(batch.pasts[s].keys[l]);
    const int64_t stay = std::max(int64_t(0), kept - rows);
    std::copy(inputs + (kept - stay) * width, inputs + kept * width, inputs);
    for (int64_t i = stay; i < kept; i++)
        std::copy_n(projected_.data() + (first_[size_t(s) + 1] - kept + i) * projected(w), width, inputs + i * width);
}

bool DeltaNet::run(Team &team, Batch &batch, int64_t l, Memory &memory) {
    const moestro_decoder &d = batch.d;
    const moestro_layer &layer = d.layer[l];
    const moestro_delta &w = *layer.delta;
    const int64_t values = w.value_heads * w.value_dim, tasks = w.value_heads + 1;
    int64_t from, to;
    const bool room = team.once([&] {
        rows_.shape(w.qkvz.kind, w.qkvz.group, batch.t, d.dim);
        out_rows_.shape(layer.out.kind, layer.out.group, batch.t, values);
    });
    if (!room) return false;
    while (team.take(batch.t, 1, &from, &to)) {
        const float *row = before_attention(batch, layer, from, memory);
        kernels().scores(row, w.ba, true, {1, 2 * w.value_heads, d.dim, d.dim, 2 * w.value_heads, 1.0f},
                         ba_.data() + from * 2 * w.value_heads,
                         memory.attention.columns.get<uint32_t>(d.dim * COLUMNS));
        set(rows_, from, row, d.dim, memory);
    }
    team.wait();
    multiply_all(team, w.qkvz, rows_, nullptr, projected_.data(), projected(w));
    while (team.take(batch.t, 1, &from, &to)) convolve(batch, w, l, from, memory);
    team.wait();
    while (team.take(batch.b * tasks, 1, &from, &to)) {
        if (from % tasks < w.value_heads) carry(batch, w, l, from / tasks, from % tasks, memory);
        else remember(batch, w, l, from / tasks);
    }
    team.wait();
    project(team, batch, layer, mixed_, values, out_rows_, memory);
    return true;
}

}  // namespace moestro
