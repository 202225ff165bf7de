// Activations f(x; p) with the derivatives that a tangent rule and its backward need:
// value, d/dx, d2/dx2, d/dp and d2/dx dp. The parameter p is learnt (Swish) or a constant (ELU, LeakyReLU).
#pragma once

#include "elementary.h"

namespace qcsbm {

template <typename A>
struct Jet {
  A value, dx, dxx, dp, dxp;
};

// x * sigmoid(p x) (Ramachandran et al. 2017).
struct Swish {
  template <typename A>
  QCSBM_HD static Jet<A> jet(A x, A p) {
    return jet(x, p, sigmoid(p * x));
  }
  // From the sigmoid of p x, also for vectors.
  template <typename A>
  QCSBM_HD static Jet<A> jet(A x, A p, A s) {
    const A u = p * x, ds = s * (1 - s), bend = 2 + u * (1 - 2 * s);
    return {x * s, s + u * ds, p * ds * bend, x * x * ds, x * ds * bend};
  }
};

// x for x > 0, else p (e^x - 1) (Clevert et al. 2016).
struct Elu {
  template <typename A>
  QCSBM_HD static Jet<A> jet(A x, A p) {
    const A e = exponential(x < A(0) ? x : A(0)), pe = p * e;
    const bool positive = x > A(0);
    return {positive ? x : pe - p, positive ? A(1) : pe, positive ? A(0) : pe, positive ? A(0) : e - A(1),
            positive ? A(0) : e};
  }
};

// x for x > 0, else p x.
struct LeakyRelu {
  template <typename A>
  QCSBM_HD static Jet<A> jet(A x, A p) {
    const bool positive = x > A(0);
    return {positive ? x : p * x, positive ? A(1) : p, A(0), positive ? A(0) : x, positive ? A(0) : A(1)};
  }
};

}  // namespace qcsbm
