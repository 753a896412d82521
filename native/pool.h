// Threads that compute one thing together: own ones, or those of an OpenMP runtime in the process.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <new>

namespace moestro {

// Memory that is read next: who waits asks for it meanwhile.
struct Ahead {
    const void *from = nullptr;
    int64_t bytes = 0;
};

// The threads of one `run`: they take chunks of a phase, then wait for each other.
class Team {
public:
    explicit Team(int threads) : threads_(threads) {}
    int threads() const { return threads_.load(std::memory_order_relaxed); }
    // Before any phase: how many threads there really are, where another runtime gives fewer.
    void set_threads(int threads) { threads_.store(threads, std::memory_order_relaxed); }

    // The next chunk of [0, tasks), at most `max_chunk` of them; false when the phase has none left.
    // Chunks shrink towards the end, so that all threads finish together.
    bool take(int64_t tasks, int64_t max_chunk, int64_t *from, int64_t *to) {
        int64_t at = next_.load(std::memory_order_relaxed), chunk;
        do {
            if (at >= tasks) return false;
            chunk = chunk_of(tasks - at, max_chunk);
        } while (!next_.compare_exchange_weak(at, at + chunk, std::memory_order_relaxed));
        *from = at;
        *to = at + chunk;
        return true;
    }
    // A phase of one thread, which makes room for the next ones; ends with a wait. False, to all alike: there is not
    // enough memory.
    template <class Make> bool once(const Make &make) {
        int64_t from, to;
        if (take(1, 1, &from, &to)) {
            try {
                make();
            } catch (const std::bad_alloc &) {
                out_of_memory_.store(true, std::memory_order_relaxed);
            }
        }
        wait();
        return !out_of_memory();
    }
    bool out_of_memory() const { return out_of_memory_.load(std::memory_order_relaxed); }
    // Where the second thread's first chunk of a phase begins; the end or beyond it: there is none.
    int64_t second(int64_t tasks, int64_t max_chunk) const { return chunk_of(tasks, max_chunk); }
    void wait(Ahead next = {});  // end of a phase: until all threads are here

private:
    int64_t chunk_of(int64_t left, int64_t max_chunk) const {
        const int64_t chunk = left / (4 * threads_);
        return chunk < 1 ? 1 : chunk > max_chunk ? max_chunk : chunk;
    }

    std::atomic<int> threads_;
    std::atomic<bool> out_of_memory_{false};
    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> round_{0};
};

using Job = std::function<void(Team &, int thread)>;

// One computation at a time: who calls `run` or uses buffers that outlive a call holds this. A fork
// waits for it; the child computes on one thread, since the others exist only in the parent.
using Lock = std::lock_guard<std::mutex>;
std::mutex &one_at_a_time();

// On at most `max_threads` threads. What a job throws, but for `Team::once`, ends the process: the others would wait
// forever.
void run(int64_t max_threads, const Job &job);
int threads();
int use_threads(int threads, void *team);

}  // namespace moestro
