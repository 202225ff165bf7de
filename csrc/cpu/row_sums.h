// Sums over the rows of a (rows, cols) tensor whose blocks of kBlock elements are handled by any thread: each stretch
// of a row within a block has a place of its own, and a row's places are added in order, so that the sums do not
// depend on the number of threads.
#pragma once

#include "parallel.h"

namespace qcsbm::QCSBM_ISA {

class RowSums {
 public:
  RowSums(int64_t rows, int64_t cols) : cols_(cols), parts_(rows + blocks_of(rows * cols, kBlock)) {}

  // Block and row only grow from one stretch to the next, so no two stretches share their sum.
  double& part(int64_t block, int64_t row) { return parts_[block + row]; }

  double total(int64_t row) const {
    double sum = 0;
    if (cols_ > 0)
      for (int64_t block = row * cols_ / kBlock; block <= ((row + 1) * cols_ - 1) / kBlock; ++block)
        sum += parts_[block + row];
    return sum;
  }

 private:
  int64_t cols_;
  Buffer<double> parts_;
};

}  // namespace qcsbm::QCSBM_ISA
