// A linear map and a mixture of experts as phases that a team of threads walks through.
#pragma once
#include <vector>

#include "pool.h"
#include "residency.h"
#include "rows.h"

namespace moestro {

constexpr int64_t SLICE = 256;  // most rows of one task
constexpr int64_t STREAM = 16;  // most blocks that a thread takes at once

// What a thread that waits for `multiply_all` may ask for.
Ahead ahead_of(const Team &team, const moestro_matrix &w);
// out [m, n] (fp32, distance `ld`) = rows · wᵀ + bias; ends with a wait.
void multiply_all(Team &team, const moestro_matrix &w, const Prepared &x, const float *bias, float *out, int64_t ld);

// Whether experts are what they say, in memory or in a file.
bool usable(const moestro_experts &w);

class Mixture {
public:
    // By one thread: group the assignments by expert and make room; begin to read what is not in memory. Throws
    // std::bad_alloc.
    void plan(const moestro_experts &w, const int64_t *tokens, const int64_t *experts, int64_t count);
    // The input of assignment `a`: its token's row.
    void set(int64_t a, const Prepared &tokens) { input_.copy(row_[size_t(a)], tokens, tokens_[a]); }
    // What a thread that waits for `compute` may ask for; `plan` is over.
    Ahead ahead(const Team &team) const;
    // All threads: gate and up, activation, down; ends with a wait. False, to all alike: an expert could not be read.
    bool compute(Team &team);
    void forget() { file_ = nullptr; }  // that of an earlier call, which may be gone
    // By one thread, after that: what was to be read is not wanted any more.
    void give_up() {
        if (file_) file_->end();
    }
    // y [dim] += Σ weight · expert over the assignments of one token, in their order.
    void add(int64_t token, const float *weights, float *y) const;

private:
    struct Task {
        int64_t expert, place, first, rows;  // place: in the order of computing
    };
    // Experts that are computed together: from memory all, from a file first those that are there, then each as it
    // comes. The ends of their places, tasks and assignments.
    struct Wave {
        int64_t places, tasks, rows;
    };
    void compute(Team &team, const Wave &from, const Wave &to);
    Ahead ahead(const Team &team, const Task *task, int64_t tasks, bool down) const;
    // At most so many blocks from one on; returns how many were computed.
    int64_t up(const Task &task, int64_t block, int64_t most, float *out);
    int64_t down(const Task &task, int64_t block, int64_t most, float *out);
    void activate(const Task &task, int64_t block, float *out);
    const uint8_t *slab(const Task &task) const;
    Blocks up_blocks(const Task &task, int64_t half) const;
    Blocks down_blocks(const Task &task) const;

    moestro_experts w_{};
    Residency *file_ = nullptr;
    const int64_t *tokens_ = nullptr, *experts_ = nullptr;
    int64_t count_ = 0;
    Prepared input_, hidden_;
    Buffer up_buffer_, down_buffer_;
    float *up_ = nullptr, *down_ = nullptr;
    std::vector<int64_t> row_;   // row of each assignment; each expert's rows begin a tile
    std::vector<int64_t> rows_;  // the same rows in their order
    std::vector<int64_t> wanted_, next_;
    std::vector<Task> tasks_;
    std::vector<Wave> waves_;
};

}  // namespace moestro
