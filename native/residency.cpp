// Threads wait for each other without spinning: a disk takes a thousand times as long as a barrier.
#include "residency.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <new>
#include <system_error>

namespace moestro {
namespace {

// All that live; never destroyed: a thread may still ask when the process ends.
struct Living {
    std::mutex mutex;
    std::vector<Residency *> all;
};
Living &living() {
    static Living &them = *new Living;
    return them;
}

}  // namespace

Residency::Residency(int fd, const moestro_slabs *mixtures, int64_t count, int readers)
    : fd_(fd), owner_(getpid()), shelves_(size_t(count)) {
    struct stat now{};
    if (fstat(fd_, &now) == 0) size_ = now.st_size, changed_s_ = now.st_mtim.tv_sec, changed_ns_ = now.st_mtim.tv_nsec;
    for (int64_t m = 0; m < count; m++) {
        Shelf &shelf = shelves_[size_t(m)];
        shelf.slabs = mixtures[m];
        shelf.slots.resize(size_t(shelf.slabs.slots));
        shelf.of.resize(size_t(shelf.slabs.experts));
        bytes_ += shelf.slots.size() * size_t(shelf.slabs.slab_bytes);
    }
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    // The system pins each page that a disk writes to: with small ones that takes as long again as the read.
    madvise(memory_, bytes_, MADV_HUGEPAGE);
#endif
    auto at = static_cast<uint8_t *>(memory_);
    for (Shelf &shelf : shelves_)
        for (Slot &slot : shelf.slots) slot.data = at, at += shelf.slabs.slab_bytes;
    try {
        std::lock_guard<std::mutex> lock(living().mutex);
        living().all.push_back(this);
    } catch (const std::bad_alloc &) {
        munmap(memory_, bytes_);
        throw;
    }
    try {
        for (int i = 0; i < readers; i++) readers_.emplace_back([this] { work(); });
    } catch (const std::system_error &) {  // with fewer, or none: the computing thread reads
    }
}

Residency::~Residency() {
    {
        std::lock_guard<std::mutex> lock(living().mutex);
        auto &all = living().all;
        all.erase(std::find(all.begin(), all.end(), this));
    }
    {
        std::lock_guard<std::mutex> lock(mutex_);
        leaving_ = true;
    }
    asked_.notify_all();
    for (auto &reader : readers_) reader.join();
    munmap(memory_, bytes_);
}

bool Residency::has(const moestro_experts &w) const {
    if (w.mixture < 0 || w.mixture >= int64_t(shelves_.size())) return false;
    const moestro_slabs &slabs = shelves_[size_t(w.mixture)].slabs;
    return slabs.slab_bytes == w.slab_bytes && slabs.experts == w.experts;
}

int64_t Residency::begin(int64_t mixture, std::vector<int64_t> &experts) {
    end();
    std::lock_guard<std::mutex> lock(mutex_);
    shelf_ = &shelves_[size_t(mixture)];
    wanted_.clear();
    for (int64_t e : experts) wanted_.push_back({e, ++clock_, shelf_->of[size_t(e)]});
    const auto missing =
        std::stable_partition(wanted_.begin(), wanted_.end(), [](const Wanted &each) { return each.slot; });
    for (auto each = wanted_.begin(); each != missing; ++each) {
        each->slot->used = each->used, each->slot->held = true;
        each->state = State::READY;
    }
    for (size_t i = 0; i < experts.size(); i++) experts[i] = wanted_[i].expert;
    next_ = size_t(missing - wanted_.begin());
    counts_.hits += int64_t(next_), counts_.misses += int64_t(wanted_.size() - next_);
    const auto there = int64_t(next_);
    assign();
    return there;
}

// Slots for those that have none, as far as there are free ones: empty, or used longest ago.
void Residency::assign() {
    for (; next_ < wanted_.size(); next_++) {
        Slot *best = nullptr;
        for (Slot &slot : shelf_->slots)
            if (!slot.held && (!best || slot.used < best->used)) best = &slot;
        if (!best) return;
        Wanted &wanted = wanted_[next_];
        if (best->expert >= 0) shelf_->of[size_t(best->expert)] = nullptr;
        best->expert = wanted.expert, best->used = wanted.used, best->held = true;
        shelf_->of[size_t(wanted.expert)] = best;
        wanted.slot = best, wanted.state = State::READS;
        fetch(next_);
    }
}

// Leave it to the readers; a child made by fork has none.
void Residency::fetch(size_t i) {
    if (!readers_.empty() && here()) {
        queue_.push_back(i);
        return asked_.notify_one();
    }
    const auto since = std::chrono::steady_clock::now();
    int64_t place = 0;
    const int32_t error = read(wanted_[i], &place);
    settle(i, error, place);
    waited(since);
}

void Residency::waited(std::chrono::steady_clock::time_point since) {
    counts_.waited_ns += std::chrono::nanoseconds(std::chrono::steady_clock::now() - since).count();
}

void Residency::work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        asked_.wait(lock, [this] { return leaving_ || !queue_.empty(); });
        if (leaving_) return;
        const size_t i = queue_.front();
        queue_.pop_front();
        reading_++;
        const Wanted wanted = wanted_[i];
        lock.unlock();
        int64_t place = 0;
        const int32_t error = read(wanted, &place);
        lock.lock();
        reading_--;
        settle(i, error, place);
    }
}

// An expert from the file; 0, or why not and where: errno, or MOESTRO_READ_….
int32_t Residency::read(const Wanted &wanted, int64_t *place) {
    const moestro_slabs &slabs = shelf_->slabs;
    const int64_t from = slabs.offset + wanted.expert * slabs.slab_bytes;
    for (int64_t done = 0; done < slabs.slab_bytes;) {
        *place = from + done;
        const int flags = fcntl(fd_, F_GETFL);  // before the read: another reader may change them meanwhile
        const ssize_t got = pread(fd_, wanted.slot->data + done, size_t(slabs.slab_bytes - done), from + done);
        if (got == 0) return MOESTRO_READ_ENDS;
        if (got > 0) {
            done += got;
            continue;
        }
        const int error = errno;
        if (error == EINTR) continue;
        if (error == EINVAL && flags >= 0 && (flags & O_DIRECT) && fcntl(fd_, F_SETFL, flags & ~O_DIRECT) == 0)
            continue;  // the file system reads through its cache only
        return error;
    }
    struct stat now{};
    if (fstat(fd_, &now) != 0) return errno;
    const bool same = now.st_size == size_ && now.st_mtim.tv_sec == changed_s_ && now.st_mtim.tv_nsec == changed_ns_;
    return same ? 0 : MOESTRO_READ_CHANGED;
}

void Residency::settle(size_t i, int32_t error, int64_t place) {
    Wanted &wanted = wanted_[i];
    wanted.state = error ? State::FAILED : State::READY;
    if (error) {
        counts_.error = error, counts_.place = place;
        shelf_->of[size_t(wanted.expert)] = nullptr;
        wanted.slot->expert = -1, wanted.slot->used = 0;
    } else {
        counts_.bytes += shelf_->slabs.slab_bytes;
    }
    settled_.notify_all();
}

bool Residency::wait(int64_t i) {
    std::unique_lock<std::mutex> lock(mutex_);
    Wanted &wanted = wanted_[size_t(i)];
    const bool first = wanted.state <= State::READS && !wanted.missed;
    const auto since = std::chrono::steady_clock::now();
    wanted.missed = true;
    settled_.wait(lock, [&] { return wanted.state > State::READS; });
    if (first) waited(since);
    return wanted.state != State::FAILED;
}

void Residency::done(int64_t i) {
    std::lock_guard<std::mutex> lock(mutex_);
    Wanted &wanted = wanted_[size_t(i)];
    if (wanted.state == State::DONE) return;
    wanted.state = State::DONE;
    wanted.slot->held = false;
    assign();
}

void Residency::end() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (size_t i : queue_) {
        Wanted &wanted = wanted_[i];
        shelf_->of[size_t(wanted.expert)] = nullptr;
        wanted.slot->expert = -1, wanted.slot->used = 0;
    }
    queue_.clear();
    settled_.wait(lock, [this] { return reading_ == 0 || !here(); });
    for (Wanted &wanted : wanted_)
        if (wanted.slot) wanted.slot->held = false;
    wanted_.clear();
    next_ = 0;
}

moestro_reads Residency::counts() {
    std::lock_guard<std::mutex> lock(mutex_);
    return counts_;
}

void Residency::hold_all() {
    living().mutex.lock();
    for (Residency *each : living().all) each->mutex_.lock();
}

void Residency::let_go_all() {
    for (Residency *each : living().all) each->mutex_.unlock();
    living().mutex.unlock();
}

}  // namespace moestro

struct moestro_residency : moestro::Residency {
    using Residency::Residency;
};

using namespace moestro;

extern "C" {

int32_t moestro_residency_open(int32_t fd, const moestro_slabs *mixtures, int64_t count, int32_t readers,
                               moestro_residency **residency) {
    if (!mixtures || count < 1 || readers < 0 || !residency) return MOESTRO_EBAD;
    for (int64_t m = 0; m < count; m++) {
        const moestro_slabs &each = mixtures[m];
        if (each.offset < 0 || each.slab_bytes < 1 || each.experts < 1 || each.slots < 1) return MOESTRO_EBAD;
    }
    try {
        *residency = new moestro_residency(fd, mixtures, count, readers);
    } catch (const std::bad_alloc &) {
        return MOESTRO_EMEMORY;
    }
    return 0;
}

int32_t moestro_residency_close(moestro_residency *residency) {
    if (residency->here()) delete residency;
    return 0;
}

int32_t moestro_residency_counts(moestro_residency *residency, moestro_reads *counts) {
    *counts = residency->counts();
    return 0;
}

}  // extern "C"
