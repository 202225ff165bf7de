// Which instruction set the kernels use: the best that the processor has, or less if QCSBM_CPU_CAPABILITY says so.
#pragma once

#if defined(QCSBM_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace qcsbm {

// amx: AVX-512 with matrix products of bfloat16 in tile registers, which csrc/amx uses.
enum class Isa { baseline = 0, avx2 = 1, avx512 = 2, amx = 3 };

inline const char* isa_name(Isa isa) {
  constexpr const char* names[] = {"baseline", "avx2", "avx512", "amx"};
  return names[static_cast<int>(isa)];
}

// Whether the processor has the tile registers and the system lets this process use them.
inline bool has_amx() {
#if defined(QCSBM_AMX)
  constexpr unsigned kTiles = 1u << 24 | 1u << 22, kBfloat16 = 1u << 5;  // AMX-TILE and AMX-BF16; AVX512_BF16
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTiles) != kTiles) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & kBfloat16)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

inline Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return v4 ? has_amx() ? Isa::amx : Isa::avx512 : v3 ? Isa::avx2 : Isa::baseline;
#else
  return Isa::baseline;
#endif
}

inline Isa active_isa() {
  static const Isa isa = [] {
    const char* wanted = std::getenv("QCSBM_CPU_CAPABILITY");
    const Isa best = best_isa();
    if (!wanted || !*wanted) return best;
    for (Isa level : {Isa::baseline, Isa::avx2, Isa::avx512, Isa::amx})
      if (std::string(wanted) == isa_name(level)) return level < best ? level : best;
    throw std::runtime_error(std::string("QCSBM_CPU_CAPABILITY: expected baseline, avx2, avx512 or amx, got ") + wanted);
  }();
  return isa;
}

// Whether float32 products may be taken in three of bfloat16; qcsbm_fast/ops/split.py says when.
inline std::atomic<bool> split_allowed{false};

}  // namespace qcsbm

// Declares a kernel for each instruction set that the build has.
#if defined(__x86_64__)
#if defined(QCSBM_AMX)
#define QCSBM_AMX_KERNEL(...) \
  namespace qcsbm::amx { __VA_ARGS__ }
#define QCSBM_AMX_CASE(...) \
  case qcsbm::Isa::amx: qcsbm::amx::__VA_ARGS__; break;
#define QCSBM_BY_REGISTERS(targs, ...)                                                                          \
  if (qcsbm::active_isa() == qcsbm::Isa::amx && (sizeof(QCSBM_UNWRAP targs) == 2 || qcsbm::split_allowed)) \
    qcsbm::amx::__VA_ARGS__;                                                                                   \
  else
#else
#define QCSBM_AMX_KERNEL(...)
#define QCSBM_AMX_CASE(...)
#define QCSBM_BY_REGISTERS(targs, ...)
#endif
#define QCSBM_KERNEL(...)                                       \
  namespace qcsbm::baseline { __VA_ARGS__ }                     \
  namespace qcsbm::avx2 { __VA_ARGS__ }                         \
  namespace qcsbm::avx512 { __VA_ARGS__ }                       \
  QCSBM_AMX_KERNEL(__VA_ARGS__)
// Those that there are from AVX2 on. Matrix registers take bfloat16, and float32 where it may be split.
#define QCSBM_IMAGE_KERNEL(...)          \
  namespace qcsbm::avx2 { __VA_ARGS__ }   \
  namespace qcsbm::avx512 { __VA_ARGS__ } \
  QCSBM_AMX_KERNEL(__VA_ARGS__)
#define QCSBM_RUN_IMAGES(fn, targs, ...)                                \
  QCSBM_BY_REGISTERS(targs, fn<QCSBM_UNWRAP targs>(__VA_ARGS__))        \
  if (qcsbm::active_isa() >= qcsbm::Isa::avx512)                        \
    qcsbm::avx512::fn<QCSBM_UNWRAP targs>(__VA_ARGS__);                 \
  else                                                                  \
    qcsbm::avx2::fn<QCSBM_UNWRAP targs>(__VA_ARGS__);
// Calls kernel fn<targs>(...) of the active one; targs in parentheses.
#define QCSBM_UNWRAP(...) __VA_ARGS__
#define QCSBM_RUN(fn, targs, ...)                                                               \
  switch (qcsbm::active_isa()) {                                                                \
    QCSBM_AMX_CASE(fn<QCSBM_UNWRAP targs>(__VA_ARGS__))                                         \
    case qcsbm::Isa::avx512: qcsbm::avx512::fn<QCSBM_UNWRAP targs>(__VA_ARGS__); break;         \
    case qcsbm::Isa::avx2: qcsbm::avx2::fn<QCSBM_UNWRAP targs>(__VA_ARGS__); break;             \
    default: qcsbm::baseline::fn<QCSBM_UNWRAP targs>(__VA_ARGS__);                              \
  }
#else
#define QCSBM_KERNEL(...) \
  namespace qcsbm::baseline { __VA_ARGS__ }
#define QCSBM_UNWRAP(...) __VA_ARGS__
#define QCSBM_RUN(fn, targs, ...) qcsbm::baseline::fn<QCSBM_UNWRAP targs>(__VA_ARGS__)
#endif
