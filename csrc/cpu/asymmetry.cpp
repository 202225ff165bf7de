// Per-sample asymmetry from J v and J^T v: one pass over K probes gives the sums and the gradient seed.
#include "parallel.h"

namespace qcsbm::QCSBM_ISA {

template <typename T>
void asymmetry(const T* jv, const T* vjp, acc_t<T>* penalty, acc_t<T>* nasym, acc_t<T>* surrogate, T* seed, int64_t batch,
               int64_t dim, int64_t probes) {
  using A = acc_t<T>;
#pragma omp parallel for schedule(static) if (batch * dim * probes > kGrain)
  for (int64_t b = 0; b < batch; ++b) {
    double difference = 0, norms = 0, slope = 0;
    for (int64_t k = 0; k < probes; ++k) {
      const int64_t end = (k * batch + b + 1) * dim;
      for (int64_t begin = end - dim; begin < end; begin += kBlock) {
        A rr = 0, nn = 0, rj = 0;
#pragma omp simd reduction(+ : rr, nn, rj)
        for (int64_t i = begin; i < std::min(end, begin + kBlock); ++i) {
          const A forward = load(jv[i]), backward = load(vjp[i]), r = forward - backward;
          rr += r * r;
          nn += forward * forward + backward * backward;
          rj += r * forward;
          seed[i] = store<T>(A(2) / static_cast<A>(probes) * r);
        }
        difference += rr;
        norms += nn;
        slope += rj;
      }
    }
    penalty[b] = static_cast<A>(0.5 * difference / static_cast<double>(probes));
    nasym[b] = static_cast<A>(norms == 0 ? 0.0 : 0.5 * difference / norms);
    surrogate[b] = static_cast<A>(2 * slope / static_cast<double>(probes));
  }
}

#define QCSBM_INSTANTIATE(T) \
  template void asymmetry<T>(const T*, const T*, acc_t<T>*, acc_t<T>*, acc_t<T>*, T*, int64_t, int64_t, int64_t);
QCSBM_INSTANTIATE(float)
QCSBM_INSTANTIATE(double)
QCSBM_INSTANTIATE(bfloat16)

}  // namespace qcsbm::QCSBM_ISA
