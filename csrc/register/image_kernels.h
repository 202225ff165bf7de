// Kernels of images that several registrations call.
#pragma once

#include "../isa.h"
#include "../math/common.h"

QCSBM_KERNEL(
    template <typename T> void group_norm_silu(const T*, const T*, const acc_t<T>*, const acc_t<T>*, const acc_t<T>*, T*,
                                               T*, acc_t<T>*, acc_t<T>*, int64_t, int64_t, int64_t, int64_t, int64_t,
                                               double, bool);
    template <typename T> void group_norm_silu_adjoint(const T*, const T*, const T*, const T*, const acc_t<T>*,
                                                       const acc_t<T>*, const acc_t<T>*, const acc_t<T>*,
                                                       const acc_t<T>*, T*, T*, acc_t<T>*, acc_t<T>*, acc_t<T>*,
                                                       int64_t, int64_t, int64_t, int64_t, int64_t, bool,
                                                       const T*, const T*, acc_t<T>);)

QCSBM_KERNEL(template <typename T> void fir(const T*, const double*, T*, int64_t, int64_t, int64_t, int64_t, int64_t,
                                            int64_t, int64_t, int64_t, int64_t, int64_t);)
