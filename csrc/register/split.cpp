// Whether float32 products may be split: qcsbm_fast/ops/split.py.
#include "../isa.h"
#include "common.h"

namespace qcsbm {
namespace {

// Returns what was so before.
bool allow_split(bool allow) { return split_allowed.exchange(allow); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qcsbm, CompositeExplicitAutograd, m) { m.impl("allow_split", TORCH_BOX(&allow_split)); }

}  // namespace qcsbm
