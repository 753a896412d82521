// Own threads spin for a moment before they sleep: between two layers of a model lie microseconds.
#include "pool.h"

#include <sched.h>

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace moestro {
namespace {

constexpr int SPINS = 20000, PATIENCE = 2000;

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

class Pool {
public:
    explicit Pool(int threads) : threads_(threads) {
        for (int i = 1; i < threads; i++) workers_.emplace_back([this, i] { work(i); });
    }
    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            leaving_ = true;
            epoch_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        for (auto &worker : workers_) worker.join();
    }
    int threads() const { return threads_; }

    void run(Team &team, const Job &job) {
        team_ = &team;
        job_ = &job;
        busy_.store(threads_ - 1, std::memory_order_relaxed);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            epoch_.fetch_add(1, std::memory_order_release);
        }
        if (asleep_.load(std::memory_order_acquire)) wake_.notify_all();
        job(team, 0);
        for (int spins = 0; busy_.load(std::memory_order_acquire); spins++)
            spins < PATIENCE ? pause() : void(sched_yield());
    }

private:
    void work(int thread) {
        int seen = 0;
        for (;;) {
            for (int spins = 0; epoch_.load(std::memory_order_acquire) == seen && spins < SPINS; spins++) pause();
            if (epoch_.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> lock(mutex_);
                asleep_.fetch_add(1, std::memory_order_release);
                wake_.wait(lock, [&] { return epoch_.load(std::memory_order_acquire) != seen; });
                asleep_.fetch_sub(1, std::memory_order_release);
            }
            seen = epoch_.load(std::memory_order_acquire);
            if (leaving_) return;
            if (thread < team_->threads()) (*job_)(*team_, thread);
            busy_.fetch_sub(1, std::memory_order_release);
        }
    }

    const int threads_;
    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<int> epoch_{0}, busy_{0}, asleep_{0};
    bool leaving_ = false;
    Team *team_ = nullptr;
    const Job *job_ = nullptr;
};

using Parallel = void (*)(void (*)(void *), void *, unsigned, unsigned);

std::mutex gate;            // one computation at a time
int wanted = 1;
Parallel borrowed = nullptr;
Pool *pool = nullptr;       // never destroyed at exit: threads may outlive static objects

struct Shared {
    Team &team;
    const Job &job;
    std::atomic<int> next{0};
};

void borrowed_thread(void *data) {
    auto shared = static_cast<Shared *>(data);
    shared->job(shared->team, shared->next.fetch_add(1));
}

}  // namespace

void Team::wait() {
    if (threads_ == 1) return next_.store(0, std::memory_order_relaxed);
    const int round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
        arrived_.store(0, std::memory_order_relaxed);
        next_.store(0, std::memory_order_relaxed);
        round_.store(round + 1, std::memory_order_release);
        return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; spins++)
        spins < PATIENCE ? pause() : void(sched_yield());
}

void run(int64_t most_useful, const Job &job) {
    std::lock_guard<std::mutex> lock(gate);
    Team team(most_useful < wanted ? (most_useful < 1 ? 1 : int(most_useful)) : wanted);
    if (team.threads() == 1) return job(team, 0);
    if (borrowed) {
        Shared shared{team, job};
        return borrowed(borrowed_thread, &shared, unsigned(team.threads()), 0);
    }
    if (pool == nullptr) pool = new Pool(wanted);
    pool->run(team, job);
}

int threads() { return wanted; }

int use_threads(int threads, void *team) {
    if (threads < 1 || threads > 1024) return -1;
    std::lock_guard<std::mutex> lock(gate);
    delete pool;
    pool = nullptr;
    wanted = threads;
    borrowed = reinterpret_cast<Parallel>(team);
    return 0;
}

}  // namespace moestro
