// Which path and which threads compute.
#include "moestro.h"

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "kernels.h"
#include "pool.h"

namespace moestro {
namespace {

const Kernels *const TABLE[] = {&portable, &avx2, &avx2_vnni, &avx512, &amx};

#if defined(__x86_64__)
bool has_amx() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const unsigned wanted = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tile, int8
    return (d & wanted) == wanted && amx_allowed();
}

bool has_avx_vnni() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
}
#endif

int best() {
#if defined(__x86_64__)
    static const int found = []() -> int {
        __builtin_cpu_init();
        if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
            return MOESTRO_PORTABLE;
        const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512vnni");
        if (!wide) return has_avx_vnni() ? MOESTRO_AVX2_VNNI : MOESTRO_AVX2;
        return has_amx() ? MOESTRO_AMX : MOESTRO_AVX512;
    }();
    return found;
#else
    return 0;
#endif
}

// Whether this machine runs a path; one with AVX-512 may lack AVX-VNNI.
bool runs(int wanted) {
    if (wanted > best()) return false;
#if defined(__x86_64__)
    return wanted != MOESTRO_AVX2_VNNI || has_avx_vnni();
#else
    return true;
#endif
}

std::atomic<int> path{-1};
}  // namespace

const Kernels &kernels() {
    const int chosen = path.load(std::memory_order_relaxed);
    return *TABLE[chosen < 0 ? best() : chosen];
}

}  // namespace moestro

using namespace moestro;

extern "C" {

int32_t moestro_abi(void) { return MOESTRO_ABI; }
int32_t moestro_best_path(void) { return best(); }
int32_t moestro_path(void) {
    const int chosen = path;
    return chosen < 0 ? best() : chosen;
}

int32_t moestro_use_path(int32_t wanted) {
    if (wanted < -1 || !runs(wanted)) return MOESTRO_EPATH;
    Lock lock(one_at_a_time());  // what computes goes on with its own
    path = wanted;
    return 0;
}

int32_t moestro_threads(void) { return threads(); }
int32_t moestro_use_threads(int32_t count, void *team) { return use_threads(count, team) ? MOESTRO_EBAD : 0; }

uint64_t moestro_read(const void *data, int64_t bytes) {
    std::atomic<uint64_t> total{0};
    const int64_t chunk = 1 << 18, chunks = bytes / chunk;
    Lock lock(one_at_a_time());
    run(chunks, [&](Team &team, int) {
        uint64_t sum = 0;
        int64_t from, to;
        while (team.take(chunks, 1, &from, &to))
            sum += kernels().read(static_cast<const char *>(data) + from * chunk, chunk);
        total += sum;
    });
    return total;
}

}  // extern "C"
