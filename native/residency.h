// Experts of a packed file of which only some are in memory at a time.
#pragma once
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include "moestro.h"

namespace moestro {

// Page-aligned memory for a fixed number of each mixture's experts, and threads that fill it. One step at a time wants
// some experts of one mixture: those that are there come first in its order, and the rest are read meanwhile. The
// experts that were used longest ago go; of the present step, those that have been computed.
class Residency {
public:
    // `fd` stays the caller's, open and not written to. Throws std::bad_alloc.
    Residency(int fd, const moestro_slabs *mixtures, int64_t count, int readers);
    ~Residency();

    bool has(const moestro_experts &w) const;
    bool here() const { return getpid() == owner_; }  // not in a child made by fork, which has no readers
    // By one thread: a step wants some experts, each once, the one used last at the end. They are put into the order
    // in which they are to be computed; returns how many of them are there. Throws std::bad_alloc.
    int64_t begin(int64_t mixture, std::vector<int64_t> &experts);
    // By all threads: until expert `i` of that order is there; false, to all threads alike, if it cannot be read.
    bool wait(int64_t i);
    const uint8_t *slab(int64_t i) const { return wanted_[size_t(i)].slot->data; }
    // By any thread: expert `i` has been computed.
    void done(int64_t i);
    // By one thread: give up what is wanted; nothing is being read afterwards.
    void end();

    moestro_reads counts();

    // Around fork: nobody reads or writes what any of them knows in between, so that a child finds it whole.
    static void hold_all();
    static void let_go_all();

private:
    struct Slot {
        uint8_t *data = nullptr;
        int64_t expert = -1;  // -1: none
        uint64_t used = 0;
        bool held = false;  // the present step has yet to compute it
    };
    struct Shelf {
        moestro_slabs slabs{};
        std::vector<Slot> slots;
        std::vector<Slot *> of;  // by expert; null: not in memory
    };
    enum class State { WAITS, READS, READY, FAILED, DONE };
    struct Wanted {
        int64_t expert = 0;
        uint64_t used = 0;
        Slot *slot = nullptr;
        State state = State::WAITS;
        bool missed = false;  // a thread waits for it, and measures how long
    };

    void work();
    void assign();
    void fetch(size_t i);
    int32_t read(const Wanted &wanted, int64_t *place);
    void settle(size_t i, int32_t error, int64_t place);
    void waited(std::chrono::steady_clock::time_point since);

    const int fd_;
    const pid_t owner_;
    int64_t size_ = 0, changed_s_ = 0, changed_ns_ = 0;
    std::vector<Shelf> shelves_;
    void *memory_ = nullptr;  // all slots, side by side
    size_t bytes_ = 0;

    std::mutex mutex_;
    std::condition_variable asked_, settled_;
    Shelf *shelf_ = nullptr;
    std::vector<Wanted> wanted_;
    size_t next_ = 0;  // the first that has no slot yet
    std::deque<size_t> queue_;
    int64_t reading_ = 0;
    uint64_t clock_ = 0;
    moestro_reads counts_{};
    bool leaving_ = false;
    std::vector<std::thread> readers_;
};

}  // namespace moestro
