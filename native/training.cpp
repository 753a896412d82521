// The training of grouped experts: weights are packed, some experts at a time, and their rows go
// through the products by chunks that stay in the cache. A block of a weight's gradient is one thread's.
#include "training.h"

#include <algorithm>
#include <new>
#include <vector>

#include "pool.h"
#include "rows.h"

namespace moestro {
namespace {

constexpr int64_t MAX_PACKED = 1 << 24;  // bytes of packed weights, or one expert's where that is more

const TrainingKernels &products() { return *training_kernels(moestro_path()); }

bool is_fp32(int32_t dtype) { return dtype == MOESTRO_ROWS_F32; }

struct Groups {
    explicit Groups(const moestro_groups &given) : g(given) {}
    int64_t start(int64_t group) const { return group ? g.ends[group - 1] : 0; }
    int64_t size(int64_t group) const { return g.ends[group] - start(group); }
    int64_t expert(int64_t group) const { return g.experts ? g.experts[group] : group; }
    const moestro_groups &g;
};

// One weight of every expert, [outs, ins], and its place in an expert's packed weights.
struct Matrix {
    const void *weights;
    int32_t dtype;
    int64_t outs, ins;
    bool back;       // multiply by w, not by its transpose
    int64_t offset;  // values before it

    int64_t inputs() const { return back ? outs : ins; }
    int64_t outputs() const { return back ? ins : outs; }
    int64_t blocks() const { return outs / 32; }  // of 32 rows, as they are packed
    // Pack 32 rows of an expert's weights into the expert's memory.
    void pack(int64_t expert, int64_t block, uint16_t *to) const {
        const int64_t at = (expert * outs + block * 32) * ins;
        const void *w = static_cast<const char *>(weights) + at * (is_fp32(dtype) ? 4 : 2);
        if (back) products().pack_columns(is_fp32(dtype), w, ins, 32, ins, outs, to + offset + block * 32 * 32);
        else products().pack_rows(is_fp32(dtype), w, ins, to + offset + block * 32 * ins);
    }
};

// Some rows of one group, and where the packed weights of its expert begin.
struct Chunk {
    int64_t first, rows, place;
};

// Groups whose weights are packed at once, and their chunks.
struct Wave {
    std::vector<int64_t> experts;
    std::vector<Chunk> chunks;
};

std::vector<Wave> waves_of(const Groups &groups, int64_t each) {
    const auto max_experts = size_t(std::max<int64_t>(1, MAX_PACKED / (each * 2)));
    std::vector<Wave> waves;
    for (int64_t e = 0; e < groups.g.count; e++) {
        const int64_t size = groups.size(e), start = groups.start(e);
        if (!size) continue;
        if (waves.empty() || waves.back().experts.size() == max_experts) waves.emplace_back();
        Wave &wave = waves.back();
        const int64_t place = int64_t(wave.experts.size()) * each;
        wave.experts.push_back(groups.expert(e));
        for (int64_t at = 0; at < size; at += CHUNK)
            wave.chunks.push_back({start + at, std::min(CHUNK, size - at), place});
    }
    return waves;
}

// Never destroyed: a thread may still compute when the process ends. Of whoever holds the lock.
Buffer &packed_buffer = *new Buffer, &scratch_buffer = *new Buffer, &transposed_buffer = *new Buffer,
       &sums_buffer = *new Buffer;

// Pack the matrices of all experts that have rows and walk through the chunks: each(chunk, the packed
// weights of its expert, `size` values of this thread's scratch memory). Throws std::bad_alloc.
template <class Each>
void for_each_chunk(const Groups &groups, const std::vector<Matrix> &matrices, int64_t size, const Each &each) {
    int64_t values = 0, blocks = 0, max_experts = 0;
    for (const Matrix &m : matrices) values += m.outs * m.ins, blocks += m.blocks();
    const std::vector<Wave> waves = waves_of(groups, values);
    for (const Wave &wave : waves) max_experts = std::max(max_experts, int64_t(wave.experts.size()));
    auto packed = packed_buffer.get<uint16_t>(max_experts * values);
    auto scratch = scratch_buffer.get<uint16_t>(threads() * size);
    run(max_experts * blocks, [&](Team &team, int thread) {
        int64_t from, to;
        for (const Wave &wave : waves) {
            while (team.take(int64_t(wave.experts.size()) * blocks, 4, &from, &to))
                for (; from < to; from++) {
                    const int64_t place = from / blocks;
                    int64_t block = from % blocks;
                    const Matrix *m = matrices.data();
                    for (; block >= m->blocks(); m++) block -= m->blocks();
                    m->pack(wave.experts[size_t(place)], block, packed + place * values);
                }
            team.wait();
            while (team.take(int64_t(wave.chunks.size()), 64, &from, &to))
                for (; from < to; from++) {
                    const Chunk &chunk = wave.chunks[size_t(from)];
                    each(chunk, packed + chunk.place, scratch + thread * size);
                }
            team.wait();
        }
    });
}

// 32 rows of a group, or what is left of it.
struct Strip {
    int64_t group, at, rows;
};
// The block of a gradient that begins at column i of the transposed matrix and j of the other.
struct GradTask {
    int64_t group, i, j;
};

// dw = Σ dy ⊗ x. The narrower of the two is transposed into tiles once; blocks of dw then share it.
// Throws std::bad_alloc.
void weight_grad(const Groups &groups, int32_t dtype, int64_t outs, int64_t ins, const uint16_t *dy, const uint16_t *x,
                 void *dw) {
    const bool by_dy = outs <= ins;
    const uint16_t *narrow = by_dy ? dy : x, *other = by_dy ? x : dy;
    const int64_t n = std::min(outs, ins), ld = std::max(outs, ins);
    std::vector<GradTask> tasks;
    std::vector<Strip> strips;
    std::vector<int64_t> first(size_t(groups.g.count), 0);  // row of each group in the transposed matrix
    int64_t rows = 0;
    for (int64_t e = 0; e < groups.g.count; e++) {
        const int64_t size = groups.size(e);
        first[size_t(e)] = rows;
        rows += round_up(size, 32);
        for (int64_t at = 0; at < size; at += 32) strips.push_back({e, at, std::min<int64_t>(32, size - at)});
        for (int64_t i = 0; i < n; i += GRAD_BLOCK)
            for (int64_t j = 0; j < ld; j += GRAD_BLOCK) tasks.push_back({e, i, j});
    }
    // The largest first, so that all threads finish together.
    std::stable_sort(tasks.begin(), tasks.end(),
                     [&](const GradTask &a, const GradTask &b) { return groups.size(a.group) > groups.size(b.group); });
    auto transposed = transposed_buffer.get<uint16_t>(rows * n);
    auto scratches = scratch_buffer.get<uint16_t>(threads() * GRAD_BLOCK * GRAD_BLOCK);
    auto sums_of = sums_buffer.get<float>(threads() * GRAD_BLOCK * GRAD_BLOCK);
    run(int64_t(tasks.size()), [&](Team &team, int thread) {
        int64_t from, to;
        while (team.take(int64_t(strips.size()), 16, &from, &to))
            for (; from < to; from++) {
                const Strip s = strips[size_t(from)];
                const int64_t depth = round_up(groups.size(s.group), 32);
                uint16_t *tile = transposed + first[size_t(s.group)] * n + s.at * 16;
                for (int64_t i = 0; i < n; i += 32)
                    products().transpose(narrow + (groups.start(s.group) + s.at) * n + i, n, s.rows, tile + i * depth,
                                         16 * depth);
            }
        team.wait();
        uint16_t *scratch = scratches + thread * GRAD_BLOCK * GRAD_BLOCK;
        float *sums = sums_of + thread * GRAD_BLOCK * GRAD_BLOCK;
        while (team.take(int64_t(tasks.size()), 1, &from, &to)) {
            const GradTask task = tasks[size_t(from)];
            const int64_t size = groups.size(task.group), depth = round_up(size, 32);
            const int64_t height = std::min(GRAD_BLOCK, n - task.i), width = std::min(GRAD_BLOCK, ld - task.j);
            if (size)
                products().sum({transposed + first[size_t(task.group)] * n + task.i * depth, depth,
                                other + groups.start(task.group) * ld + task.j, ld, size, height, width},
                               scratch, sums);
            else std::fill(sums, sums + GRAD_BLOCK * GRAD_BLOCK, 0.0f);
            const int64_t row = by_dy ? task.i : task.j, column = by_dy ? task.j : task.i;
            const int64_t at = (groups.expert(task.group) * outs + row) * ins + column;
            products().write(sums, height, width, !by_dy, is_fp32(dtype),
                             static_cast<char *>(dw) + at * (is_fp32(dtype) ? 4 : 2), ins);
        }
    });
}

bool valid_groups(const moestro_groups *g, int32_t dtype) {
    if (!g || !g->ends || g->count < 1 || g->rows < 0 || !valid_rows(dtype)) return false;
    for (int64_t e = 0; e < g->count; e++)
        if (g->ends[e] < (e ? g->ends[e - 1] : 0) || g->ends[e] > g->rows) return false;
    if (!g->experts) return true;
    std::vector<bool> seen(size_t(g->count), false);
    for (int64_t e = 0; e < g->count; e++) {
        if (g->experts[e] < 0 || g->experts[e] >= g->count || seen[size_t(g->experts[e])]) return false;
        seen[size_t(g->experts[e])] = true;
    }
    return true;
}

bool valid_width(int64_t width) { return width >= 32 && width % 32 == 0; }

// Check what all functions are given, then compute alone; `arguments` says whether the rest is good.
template <class Compute>
int32_t train(const moestro_groups *g, int32_t dtype, int64_t a, int64_t b, bool arguments, const Compute &compute) {
    try {
        Lock lock(one_at_a_time());
        if (!moestro_trains()) return MOESTRO_EPATH;
        if (!valid_groups(g, dtype) || !valid_width(a) || !valid_width(b) || !arguments) return MOESTRO_EBAD;
        compute(Groups(*g));
    } catch (const std::bad_alloc &) {
        return MOESTRO_EMEMORY;
    }
    return 0;
}

const uint16_t *bits(const void *rows) { return static_cast<const uint16_t *>(rows); }
uint16_t *bits(void *rows) { return static_cast<uint16_t *>(rows); }

}  // namespace
}  // namespace moestro

using namespace moestro;

extern "C" {

int32_t moestro_trains(void) { return training_kernels(moestro_path()) ? 1 : 0; }

int32_t moestro_grouped(const moestro_groups *g, int32_t dtype, const void *w, int64_t o, int64_t i, int32_t back,
                        const void *x, void *y) {
    const bool given = w && (!g || !g->rows || (x && y));
    return train(g, dtype, o, i, given, [&](const Groups &groups) {
        const Matrix m{w, dtype, o, i, back != 0, 0};
        const int64_t k = m.inputs(), n = m.outputs();
        for_each_chunk(groups, {m}, 0, [&](const Chunk &c, const uint16_t *packed, uint16_t *) {
            products().multiply(bits(x) + c.first * k, c.rows, k, packed, n, bits(y) + c.first * n, {});
        });
    });
}

int32_t moestro_grouped_grad(const moestro_groups *g, int32_t dtype, int64_t o, int64_t i, const void *dy,
                             const void *x, void *dw) {
    const bool given = dw && (!g || !g->rows || (dy && x));
    return train(g, dtype, o, i, given,
                 [&](const Groups &groups) { weight_grad(groups, dtype, o, i, bits(dy), bits(x), dw); });
}

int32_t moestro_ffn(const moestro_groups *g, int32_t dtype, const void *up, const void *down, int64_t d, int64_t f,
                    const void *x, void *hidden, void *y) {
    const bool given = up && down && (!g || !g->rows || (x && y));
    return train(g, dtype, d, f, given, [&](const Groups &groups) {
        const Matrix first{up, dtype, 2 * f, d, false, 0}, second{down, dtype, d, f, false, 2 * f * d};
        for_each_chunk(groups, {first, second}, CHUNK * 3 * f,
                       [&](const Chunk &c, const uint16_t *packed, uint16_t *scratch) {
                           uint16_t *act = scratch, *h = hidden ? bits(hidden) + c.first * 2 * f : scratch + CHUNK * f;
                           products().multiply(bits(x) + c.first * d, c.rows, d, packed, 2 * f, h, {});
                           products().swiglu(h, c.rows, f, act);
                           products().multiply(act, c.rows, f, packed + second.offset, d, bits(y) + c.first * d, {});
                       });
    });
}

int32_t moestro_ffn_back(const moestro_groups *g, int32_t dtype, const void *up, const void *down, int64_t d, int64_t f,
                         const void *dy, const void *hidden, void *dhidden, void *act, void *dx) {
    const bool given = up && down && (!g || !g->rows || (dy && hidden && dhidden && act && dx));
    return train(g, dtype, d, f, given, [&](const Groups &groups) {
        const Matrix first{down, dtype, d, f, true, 0}, second{up, dtype, 2 * f, d, true, f * d};
        const int64_t lines = (64 * 64 + d - 1) / d;
        for_each_chunk(
            groups, {first, second}, CHUNK * f, [&](const Chunk &c, const uint16_t *packed, uint16_t *scratch) {
                const uint16_t *h = bits(hidden) + c.first * 2 * f;
                uint16_t *grad = bits(dhidden) + c.first * 2 * f;
                products().multiply(bits(dy) + c.first * d, c.rows, d, packed, f, scratch,
                                    {h, 4 * f, 4 * f, c.rows, lines});
                products().swiglu_back(scratch, h, c.rows, f, grad, bits(act) + c.first * f);
                products().multiply(grad, c.rows, 2 * f, packed + second.offset, d, bits(dx) + c.first * d, {});
            });
    });
}

}  // extern "C"
