// Rows are grouped by expert; each expert's blocks stream past its rows. The path and the number of
// rows never change a bit of the result, so a token's output does not depend on its batch.
#include "mixture.h"

#include <algorithm>

#include "blocks.h"

namespace moestro {

namespace {

// One word of each column: an input, or two of 16 bits.
template <class T> MOESTRO_INLINE void line(const T *from, int64_t output, int64_t input, int64_t n, uint32_t *to) {
    for (int64_t c = 0; c < n; c++) {
        const T *at = from + c * output;
        to[c] = sizeof(T) == 4 ? at[0] : at[0] | uint32_t(at[input]) << 16;
    }
}

// The compiler makes whole registers of lines whose steps and length it knows.
template <class T>
MOESTRO_INLINE void lines(const T *from, int64_t output, int64_t input, int64_t n, int64_t k, int64_t words,
                          uint32_t *to) {
    constexpr int64_t inputs = 4 / sizeof(T);
    const int64_t whole = k / inputs;
    if (n < COLUMNS || whole < words) std::fill(to, to + words * COLUMNS, 0u);
    for (int64_t w = 0; w < whole; w++, from += inputs * input, to += COLUMNS) {
        if (output == 1 && n == COLUMNS) line(from, 1, input, COLUMNS, to);
        else if (output == 2 && n == COLUMNS) line(from, 2, input, COLUMNS, to);
        else line(from, output, input, n, to);
    }
    for (int64_t c = 0; whole * inputs < k && c < n; c++) to[c] = from[c * output];
}

MOESTRO_WIDE void lines_of(const uint16_t *from, int64_t output, int64_t input, int64_t n, int64_t k, int64_t words,
                           uint32_t *to) {
    lines(from, output, input, n, k, words, to);
}

MOESTRO_WIDE void lines_of(const uint32_t *from, int64_t output, int64_t input, int64_t n, int64_t k, int64_t words,
                           uint32_t *to) {
    lines(from, output, input, n, k, words, to);
}

// Inputs k0 to k0 + PAIRS of rows, in memory of this thread.
Rows piece(const Rows &x, int64_t k0, bool fp32) {
    static thread_local Buffer values_buffer, bits_buffer;
    Rows some;
    some.m = x.m, some.k = std::min(PAIRS, x.k - k0);
    auto values = values_buffer.get<float>(x.m * some.k);
    for (int64_t r = 0; r < x.m; r++) std::copy_n(x.values + r * x.k + k0, some.k, values + r * some.k);
    some.values = values;
    if (fp32) return some;
    auto bits = bits_buffer.get<uint16_t>(round_up(x.m, TILE) * PAIRS);
    for (int64_t r = 0; r < x.m; r += TILE)
        std::copy_n(x.bits + Rows::tile_offset(r, k0 / PAIRS, PAIRS, x.k), TILE * PAIRS, bits + r * PAIRS);
    some.bits = bits;
    return some;
}

// Rows times blocks from `b` on of one or two matrices that lie anywhere: out [blocks, m, halves, 32]. A few inputs of
// all blocks at a time, whose memory is in few pages. bf16 sums are those of whole blocks, fp32 sums are of 32 inputs.
void multiply_spread(const Blocks *matrices, int64_t halves, int64_t b, int64_t blocks, const Rows &x, bool fp32,
                     float *out) {
    std::fill(out, out + blocks * x.m * halves * COLUMNS, 0.0f);
    std::vector<float> sums(size_t(x.m * COLUMNS));
    for (int64_t k0 = 0; k0 < x.k; k0 += PAIRS) {
        const Rows rows = piece(x, k0, fp32);
        for (int64_t j = 0; j < blocks * halves; j++) {
            const int64_t block = j / halves, half = j % halves;
            const Block weights = matrices[half].piece(b + block, k0, rows.k, thread_buffer());
            kernels().multiply(weights, rows, sums.data(), COLUMNS);
            for (int64_t r = 0; r < x.m; r++) {
                float *to = out + ((block * x.m + r) * halves + half) * COLUMNS;
                for (int64_t c = 0; c < COLUMNS; c++) to[c] += sums[size_t(r * COLUMNS + c)];
            }
        }
    }
}

// Blocks to multiply with so many rows at once: what they make stays in a cache.
int64_t together(int64_t rows) { return rows <= TILE ? STREAM : 4; }

}  // namespace

void gather(const uint8_t *from, int64_t size, int64_t output, int64_t input, int64_t columns, int64_t k, int64_t words,
            uint32_t *to) {
    if (size == 4) lines_of(reinterpret_cast<const uint32_t *>(from), output, input, columns, k, words, to);
    else lines_of(reinterpret_cast<const uint16_t *>(from), output, input, columns, k, words, to);
}

Ahead ahead_of(const Team &team, const moestro_matrix &w) {
    return Blocks(w.data, w.kind, w.group, w.n, w.k).ahead(team.second(blocks_of(w.n), STREAM));
}

void multiply_all(Team &team, const moestro_matrix &w, const Prepared &x, const float *bias, float *out, int64_t ld) {
    const int64_t blocks = blocks_of(w.n), m = x.rows.m, slices = (m + SLICE - 1) / SLICE;
    const Blocks weights(w.data, w.kind, w.group, w.n, w.k);
    std::vector<float> part(size_t(std::min(m, SLICE) * COLUMNS));
    Buffer &transposed = thread_buffer();
    int64_t from, to;
    while (team.take(blocks * slices, STREAM, &from, &to))
        for (; from < to; from++) {
            const int64_t b = from % blocks, first = from / blocks * SLICE, rows = std::min(SLICE, m - first);
            const int64_t n = std::min(COLUMNS, w.n - b * COLUMNS);
            kernels().multiply(weights.at(b, transposed), x.part(first, rows), part.data(), COLUMNS);
            for (int64_t i = 0; i < rows; i++) {
                float *to_row = out + (first + i) * ld + b * COLUMNS;
                for (int64_t c = 0; c < n; c++)
                    to_row[c] = part[size_t(i * COLUMNS + c)] + (bias ? bias[b * COLUMNS + c] : 0.0f);
            }
        }
    team.wait();
}

bool usable(const moestro_experts &w) {
    return valid(w) && (!w.residency || reinterpret_cast<const Residency *>(w.residency)->has(w));
}

void Mixture::plan(const moestro_experts &w, const int64_t *tokens, const int64_t *experts, int64_t count) {
    w_ = w, tokens_ = tokens, experts_ = experts, count_ = count;
    file_ = reinterpret_cast<Residency *>(w.residency);
    next_.assign(size_t(w.experts), 0);
    wanted_.clear();
    for (int64_t end = count, begin; end > 0; end = begin) {  // the last token's first choice was used last
        for (begin = end; begin > 0 && tokens[begin - 1] == tokens[end - 1];) begin--;
        for (int64_t a = begin; a < end; a++)
            if (next_[size_t(experts[a])]++ == 0) wanted_.push_back(experts[a]);
    }
    if (file_) std::reverse(wanted_.begin(), wanted_.end());
    else std::sort(wanted_.begin(), wanted_.end());
    const auto all = int64_t(wanted_.size()), together = file_ ? file_->begin(w.mixture, wanted_) : all;
    tasks_.clear(), rows_.clear(), waves_.assign(1, Wave{});
    int64_t row = 0;
    for (int64_t place = 0; place < all; place++) {
        const int64_t e = wanted_[size_t(place)], first = row, rows = next_[size_t(e)];
        for (int64_t r = 0; r < rows; r += SLICE) tasks_.push_back({e, place, first + r, std::min(SLICE, rows - r)});
        for (int64_t r = 0; r < rows; r++) rows_.push_back(first + r);
        row += round_up(rows, TILE);
        next_[size_t(e)] = first;
        if (place >= together - 1) waves_.push_back({place + 1, int64_t(tasks_.size()), int64_t(rows_.size())});
    }
    row_.resize(size_t(count));
    for (int64_t a = 0; a < count; a++) row_[size_t(a)] = next_[size_t(experts[a])]++;
    input_.shape(w.kind, w.group, row, w.dim);
    hidden_.shape(w.down_kind, w.group, row, w.hidden);
    up_ = up_buffer_.get<float>(row * hidden_.rows.k);
    down_ = down_buffer_.get<float>(row * blocks_of(w.dim) * COLUMNS);
}

const uint8_t *Mixture::slab(const Task &task) const {
    return file_ ? file_->slab(task.place) : static_cast<const uint8_t *>(w_.data) + task.expert * w_.slab_bytes;
}

Blocks Mixture::up_blocks(const Task &task, int64_t half) const {
    const int64_t halves = gated(w_.activation) ? 2 : 1;
    if (plain(w_.kind)) return {half ? w_.up : w_.data, w_.kind, task.expert, w_.up_steps, w_.hidden, w_.dim};
    const uint8_t *from = slab(task) + half * block_bytes(w_.kind, w_.group, w_.dim);
    return {from, w_.kind, w_.group, w_.hidden, w_.dim, halves};
}

Blocks Mixture::down_blocks(const Task &task) const {
    if (plain(w_.kind)) return {w_.down, w_.kind, task.expert, w_.down_steps, w_.dim, w_.hidden};
    const int64_t up = block_bytes(w_.kind, w_.group, w_.dim) * blocks_of(w_.hidden) * (gated(w_.activation) ? 2 : 1);
    return {slab(task) + up, w_.down_kind, w_.group, w_.dim, w_.hidden};
}

int64_t Mixture::up(const Task &task, int64_t b, int64_t most, float *out) {
    const int64_t halves = gated(w_.activation) ? 2 : 1;
    const Rows rows = input_.part(task.first, task.rows);
    const Blocks weights[2] = {up_blocks(task, 0), up_blocks(task, halves - 1)};
    if (weights[0].spread()) {
        const int64_t blocks = std::min({most, together(task.rows), blocks_of(w_.hidden) - b});
        multiply_spread(weights, halves, b, blocks, rows, is_fp32(w_.kind), out);
        for (int64_t j = 0; j < blocks; j++) activate(task, b + j, out + j * task.rows * halves * COLUMNS);
        return blocks;
    }
    for (int64_t i = 0; i < halves; i++)
        kernels().multiply(weights[i].at(b, thread_buffer()), rows, out + i * COLUMNS, halves * COLUMNS);
    activate(task, b, out);
    return 1;
}

int64_t Mixture::down(const Task &task, int64_t b, int64_t most, float *out) {
    const int64_t ld = blocks_of(w_.dim) * COLUMNS;
    const Rows rows = hidden_.part(task.first, task.rows);
    const Blocks weights = down_blocks(task);
    float *to = down_ + task.first * ld + b * COLUMNS;
    if (!weights.spread()) {
        kernels().multiply(weights.at(b, thread_buffer()), rows, to, ld);
        return 1;
    }
    const int64_t blocks = std::min({most, together(task.rows), blocks_of(w_.dim) - b});
    multiply_spread(&weights, 1, b, blocks, rows, is_fp32(w_.kind), out);
    for (int64_t j = 0; j < blocks * task.rows; j++)
        std::copy_n(out + j * COLUMNS, COLUMNS, to + j % task.rows * ld + j / task.rows * COLUMNS);
    return blocks;
}

void Mixture::activate(const Task &task, int64_t b, float *out) {
    const int64_t halves = gated(w_.activation) ? 2 : 1, width = halves * COLUMNS;
    const int64_t n = std::min(COLUMNS, w_.hidden - b * COLUMNS);
    const float *bias = w_.up_bias ? w_.up_bias + task.expert * w_.hidden * halves + b * COLUMNS : nullptr;
    for (int64_t r = 0; r < task.rows; r++) {
        float *line = out + r * width;
        for (int64_t i = 0; bias && i < halves; i++)
            for (int64_t c = 0; c < n; c++) line[i * COLUMNS + c] += bias[i * w_.hidden + c];
        kernels().activate(w_.activation, line, line + COLUMNS, up_ + (task.first + r) * hidden_.rows.k + b * COLUMNS,
                           n);
    }
}

Ahead Mixture::ahead(const Team &team) const { return ahead(team, tasks_.data(), int64_t(tasks_.size()), false); }

Ahead Mixture::ahead(const Team &team, const Task *task, int64_t tasks, bool down) const {
    const int64_t count = blocks_of(down ? w_.dim : w_.hidden), at = team.second(tasks * count, STREAM);
    if (file_ || at >= tasks * count) return {};
    const Task &second = task[at / count];
    return (down ? down_blocks(second) : up_blocks(second, 0)).ahead(at % count);
}

bool Mixture::compute(Team &team) {
    for (size_t wave = 1; wave < waves_.size(); wave++) {
        const Wave &from = waves_[wave - 1], &to = waves_[wave];
        for (int64_t place = from.places; file_ && place < to.places; place++)
            if (!file_->wait(place)) return false;
        compute(team, from, to);
        for (int64_t place = from.places; file_ && place < to.places; place++) file_->done(place);
    }
    return true;
}

void Mixture::compute(Team &team, const Wave &begin, const Wave &end) {
    const int64_t up_count = blocks_of(w_.hidden), down_count = blocks_of(w_.dim), k = hidden_.rows.k,
                  tasks = end.tasks - begin.tasks;
    const Task *task = tasks_.data() + begin.tasks;
    static thread_local Buffer blocks_buffer;  // of what is computed at once, which is written before it is read
    float *out = blocks_buffer.get<float>(4 * SLICE * COLUMNS * 2);
    int64_t from, to;
    while (team.take(tasks * up_count, STREAM, &from, &to))
        while (from < to) from += up(task[from / up_count], from % up_count, to - from, out);
    team.wait();
    while (team.take(end.rows - begin.rows, 1, &from, &to)) {
        const int64_t at = rows_[size_t(begin.rows + from)];
        float *row = up_ + at * k;
        std::fill(row + w_.hidden, row + k, 0.0f);
        hidden_.set(at, row);
    }
    team.wait(ahead(team, task, tasks, true));
    while (team.take(tasks * down_count, STREAM, &from, &to))
        while (from < to) from += down(task[from / down_count], from % down_count, to - from, out);
    team.wait();
}

void Mixture::add(int64_t token, const float *weights, float *y) const {
    const int64_t ld = blocks_of(w_.dim) * COLUMNS;
    for (int64_t a = std::lower_bound(tokens_, tokens_ + count_, token) - tokens_; a < count_ && tokens_[a] == token;
         a++) {
        const float *line = down_ + row_[size_t(a)] * ld;
        if (w_.down_bias) kernels().add(weights[a], w_.down_bias + experts_[a] * w_.dim, y, w_.dim);
        kernels().add(weights[a], line, y, w_.dim);
    }
}

}  // namespace moestro

using namespace moestro;

extern "C" {

int32_t moestro_linear(const moestro_matrix *w, int32_t dtype, const void *x, int64_t m, void *y, const float *bias) {
    if (!w || !valid(*w) || !valid_rows(dtype) || m < 0) return MOESTRO_EBAD;
    if (m == 0) return 0;
    if (!x || !y) return MOESTRO_EBAD;
    Lock lock(one_at_a_time());
    // Never destroyed: a thread may still compute when the process ends.
    static Prepared &input = *new Prepared;
    static Buffer &result = *new Buffer;
    try {
        input.shape(w->kind, w->group, m, w->k);
        float *out = dtype == MOESTRO_ROWS_F32 ? static_cast<float *>(y) : result.get<float>(m * w->n);
        run(blocks_of(w->n), [&](Team &team, int) {
            std::vector<float> row(size_t(input.rows.k));
            int64_t from, to;
            while (team.take(m, 1, &from, &to)) {
                read_row(dtype, x, from, w->k, input.rows.k, row.data());
                input.set(from, row.data());
            }
            team.wait();
            multiply_all(team, *w, input, bias, out, w->n);
            if (dtype == MOESTRO_ROWS_F32) return;
            while (team.take(m, 1, &from, &to)) write_row(dtype, y, from * w->n, out + from * w->n, w->n);
        });
    } catch (const std::bad_alloc &) {
        return MOESTRO_EMEMORY;
    }
    return 0;
}

int32_t moestro_mixture(const moestro_experts *w, int32_t dtype, const void *x, int64_t t, const int64_t *tokens,
                        const int64_t *experts, const float *weights, int64_t assignments, void *y) {
    if (!w || !usable(*w) || !valid_rows(dtype) || t < 0 || assignments < 0) return MOESTRO_EBAD;
    if ((t && (!x || !y)) || (assignments && (!tokens || !experts || !weights))) return MOESTRO_EBAD;
    for (int64_t a = 0; a < assignments; a++) {
        if (experts[a] < 0 || experts[a] >= w->experts || tokens[a] < 0 || tokens[a] >= t) return MOESTRO_EBAD;
        if (a && tokens[a] < tokens[a - 1]) return MOESTRO_EBAD;
    }
    if (t == 0) return 0;
    Lock lock(one_at_a_time());
    static Mixture &mixture = *new Mixture;
    static Prepared &input = *new Prepared;
    std::atomic<bool> whole{true};
    try {
        mixture.plan(*w, tokens, experts, assignments);
        input.shape(w->kind, w->group, t, w->dim);
        run(INT32_MAX, [&](Team &team, int) {
            std::vector<float> row(size_t(input.rows.k));
            int64_t from, to;
            while (team.take(t, 4, &from, &to))
                for (; from < to; from++) {
                    read_row(dtype, x, from, w->dim, input.rows.k, row.data());
                    input.set(from, row.data());
                }
            team.wait();
            while (team.take(assignments, 4, &from, &to))
                for (; from < to; from++) mixture.set(from, input);
            team.wait();
            if (!mixture.compute(team)) return whole.store(false);
            while (team.take(t, 4, &from, &to))
                for (; from < to; from++) {
                    std::fill(row.begin(), row.end(), 0.0f);
                    mixture.add(from, weights, row.data());
                    write_row(dtype, y, from * w->dim, row.data(), w->dim);
                }
        });
    } catch (const std::bad_alloc &) {
        return MOESTRO_EMEMORY;
    }
    if (whole) return 0;
    mixture.give_up();
    return MOESTRO_EREAD;
}

}  // extern "C"
