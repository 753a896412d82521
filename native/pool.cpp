// Own threads spin for a moment before they sleep: between two layers of a model lie microseconds.
#include "pool.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>

#include <condition_variable>
#include <system_error>
#include <thread>
#include <vector>

#include "residency.h"

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
    // As many threads as the system gives, at most `threads`.
    explicit Pool(int threads) {
        workers_.reserve(size_t(threads));
        try {
            for (int i = 1; i < threads; i++) workers_.emplace_back([this, i] { work(i); });
        } catch (const std::system_error &) {
        }
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
    int threads() const { return int(workers_.size()) + 1; }

    void run(Team &team, const Job &job) {
        team_ = &team;
        job_ = &job;
        busy_.store(threads() - 1, std::memory_order_relaxed);
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

    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<int> epoch_{0}, busy_{0}, asleep_{0};
    bool leaving_ = false;
    Team *team_ = nullptr;
    const Job *job_ = nullptr;
};

using Parallel = void (*)(void (*)(void *), void *, unsigned, unsigned);

std::mutex compute_mutex;
std::atomic<int> wanted{1};
Parallel borrowed = nullptr;
int (*borrowed_count)() = nullptr;  // how many of the other runtime's threads are in the team
bool forked = false;                // this process is a child: the other runtime's threads are gone
Pool *pool = nullptr;               // never destroyed at exit: threads may outlive static objects

// In the order in which a step locks them.
void before_fork() {
    compute_mutex.lock();
    Residency::hold_all();
}
void after_fork() {
    Residency::let_go_all();
    compute_mutex.unlock();
}
void in_child() {
    pool = nullptr, borrowed = nullptr, forked = true;
    wanted = 1;
    after_fork();
}

[[maybe_unused]] const int handled = pthread_atfork(before_fork, after_fork, in_child);

// The function beside GOMP_parallel that counts a team; null where it is not found.
int (*counter_of(void *team))() {
    Dl_info info;
    if (!team || !dladdr(team, &info) || !info.dli_fname) return nullptr;
    void *library = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    return library ? reinterpret_cast<int (*)()>(dlsym(library, "omp_get_num_threads")) : nullptr;
}

struct Shared {
    Team &team;
    const Job &job;
    std::atomic<int> next{0};
};

void borrowed_thread(void *data) {
    auto shared = static_cast<Shared *>(data);
    shared->team.set_threads(borrowed_count());  // a limit or a parallel region around it leaves fewer
    shared->job(shared->team, shared->next.fetch_add(1));
}

}  // namespace

void Team::wait(Ahead next) {
    const int threads = this->threads();
    if (threads == 1) return next_.store(0, std::memory_order_relaxed);
    const int round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
        arrived_.store(0, std::memory_order_relaxed);
        next_.store(0, std::memory_order_relaxed);
        round_.store(round + 1, std::memory_order_release);
        return;
    }
    auto at = static_cast<const char *>(next.from), end = at + next.bytes;
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; spins++)
        if (at < end) __builtin_prefetch(at), at += 64;
        else spins < PATIENCE ? pause() : void(sched_yield());
}

std::mutex &one_at_a_time() { return compute_mutex; }

void run(int64_t max_threads, const Job &given) {
    const Job job = [&given](Team &team, int thread) noexcept { given(team, thread); };
    const int most = wanted, useful = max_threads < most ? int(max_threads) : most;
    Team team(useful < 1 ? 1 : useful);
    if (team.threads() == 1) return job(team, 0);
    if (borrowed) {
        Shared shared{team, job};
        return borrowed(borrowed_thread, &shared, unsigned(team.threads()), 0);
    }
    if (pool == nullptr) pool = new Pool(most);
    if (pool->threads() < team.threads()) team.set_threads(pool->threads());
    pool->run(team, job);
}

int threads() { return wanted; }

int use_threads(int threads, void *team) {
    if (threads < 1 || threads > 1024) return -1;
    Lock lock(compute_mutex);
    delete pool;
    pool = nullptr;
    wanted = threads;
    borrowed_count = forked ? nullptr : counter_of(team);
    borrowed = borrowed_count ? reinterpret_cast<Parallel>(team) : nullptr;
    return 0;
}

}  // namespace moestro
