// AVX2 with AVX-VNNI: one instruction for four products of bytes, where AVX2 alone takes three.
#if defined(__x86_64__) && !defined(__clang__) && __GNUC__ < 11
#include "kernels.h"
namespace moestro {
const Kernels avx2_vnni = avx2;  // this compiler does not know the instruction
}
#else
#define MOESTRO_WITH_VNNI
#include "avx2.cpp"
#endif
