// Threads that compute one thing together: own ones, or those of an OpenMP runtime in the process.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>

namespace moestro {

// The threads of one `run`: they take pieces of a phase, then wait for each other.
class Team {
public:
    explicit Team(int threads) : threads_(threads) {}
    int threads() const { return threads_.load(std::memory_order_relaxed); }
    // Before any phase: how many there really are, where another runtime gives fewer.
    void are(int threads) { threads_.store(threads, std::memory_order_relaxed); }

    // The next piece of [0, tasks), at most `most` of them; false when the phase has none left.
    // Pieces shrink towards the end, so that all threads finish together.
    bool take(int64_t tasks, int64_t most, int64_t *from, int64_t *to) {
        int64_t at = next_.load(std::memory_order_relaxed), piece;
        do {
            if (at >= tasks) return false;
            piece = (tasks - at) / (4 * threads_);
            piece = piece < 1 ? 1 : piece > most ? most : piece;
        } while (!next_.compare_exchange_weak(at, at + piece, std::memory_order_relaxed));
        *from = at;
        *to = at + piece;
        return true;
    }
    void wait();  // end of a phase: until all threads are here

private:
    std::atomic<int> threads_;
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> round_{0};
};

using Job = std::function<void(Team &, int thread)>;

// One computation at a time: who calls `run` or uses buffers that outlive a call holds this. A fork
// waits for it; the child computes on one thread, since the others exist only in the parent.
using Lock = std::lock_guard<std::mutex>;
std::mutex &one_at_a_time();

// On at most `most_useful` threads. What a job throws ends the process: the others would wait forever.
void run(int64_t most_useful, const Job &job);
int threads();
int use_threads(int threads, void *team);

}  // namespace moestro
