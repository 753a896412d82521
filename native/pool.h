// Threads that compute one thing together: own ones, or those of an OpenMP runtime in the process.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>

namespace moestro {

// The threads of one `run`: they take pieces of a phase, then wait for each other.
class Team {
public:
    explicit Team(int threads) : threads_(threads) {}
    int threads() const { return threads_; }

    // The next piece of [0, tasks); false when the phase has none left.
    bool take(int64_t tasks, int64_t piece, int64_t *from, int64_t *to) {
        const int64_t at = next_.fetch_add(piece, std::memory_order_relaxed);
        if (at >= tasks) return false;
        *from = at;
        *to = at + piece < tasks ? at + piece : tasks;
        return true;
    }
    // Pieces large enough to stream through memory, small enough that no thread waits long.
    int64_t piece(int64_t tasks) const {
        const int64_t even = tasks / (8 * threads_);
        return even < 1 ? 1 : even > 16 ? 16 : even;
    }
    void wait();  // end of a phase: until all threads are here

private:
    const int threads_;
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> round_{0};
};

using Job = std::function<void(Team &, int thread)>;

void run(int64_t most_useful, const Job &job);  // one at a time, on at most that many threads
int threads();
int use_threads(int threads, void *team);

}  // namespace moestro
