// Which instruction set the kernels use: the best that the processor has, or less if QCSBM_CPU_CAPABILITY says so.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace qcsbm {

enum class Isa { baseline = 0, avx2 = 1, avx512 = 2 };

inline const char* isa_name(Isa isa) {
  constexpr const char* names[] = {"baseline", "avx2", "avx512"};
  return names[static_cast<int>(isa)];
}

inline Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return v4 ? Isa::avx512 : v3 ? Isa::avx2 : Isa::baseline;
#else
  return Isa::baseline;
#endif
}

inline Isa active_isa() {
  static const Isa isa = [] {
    const char* wanted = std::getenv("QCSBM_CPU_CAPABILITY");
    const Isa best = best_isa();
    if (!wanted || !*wanted) return best;
    for (Isa level : {Isa::baseline, Isa::avx2, Isa::avx512})
      if (std::string(wanted) == isa_name(level)) return level < best ? level : best;
    throw std::runtime_error(std::string("QCSBM_CPU_CAPABILITY: expected baseline, avx2 or avx512, got ") + wanted);
  }();
  return isa;
}

}  // namespace qcsbm

// Declares a kernel for each instruction set that the build has.
#if defined(__x86_64__)
#define QCSBM_KERNEL(...)                                       \
  namespace qcsbm::baseline { __VA_ARGS__ }                     \
  namespace qcsbm::avx2 { __VA_ARGS__ }                         \
  namespace qcsbm::avx512 { __VA_ARGS__ }
// Calls kernel fn<targs>(...) of the active one; targs in parentheses.
#define QCSBM_UNWRAP(...) __VA_ARGS__
#define QCSBM_RUN(fn, targs, ...)                                                               \
  switch (qcsbm::active_isa()) {                                                                \
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
