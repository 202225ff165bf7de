// What has no tensors: the processor's features, the build record, and the scalar formulas of csrc/math as the
// unit tests call them.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "build_record.h"
#include "isa.h"
#include "math/activation.h"
#include "math/philox.h"

namespace py = pybind11;

namespace {

template <typename A>
std::tuple<A, A, A, A, A> activation(const std::string& kind, A x, A p) {
  const auto jet = [&] {
    if (kind == "swish") return qcsbm::Swish::jet(x, p);
    if (kind == "elu") return qcsbm::Elu::jet(x, p);
    if (kind == "leaky_relu") return qcsbm::LeakyRelu::jet(x, p);
    throw std::invalid_argument("kind: expected swish, elu or leaky_relu, got " + kind);
  }();
  return {jet.value, jet.dx, jet.dxx, jet.dp, jet.dxp};
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Processor features, build record and scalar formulas.";
  m.def("build_record", [] { return std::string(QCSBM_BUILD_RECORD); });
  m.def("best_isa", [] { return std::string(qcsbm::isa_name(qcsbm::best_isa())); });
  m.def("active_isa", [] { return std::string(qcsbm::isa_name(qcsbm::active_isa())); });
  m.def("exponential", [](float x) { return qcsbm::exponential(x); });
  m.def("logarithm", [](float x) { return qcsbm::logarithm(x); });
  m.def("sincospi", [](float t) {
    float s, c;
    qcsbm::sincospi(t, s, c);
    return std::tuple(s, c);
  });
  m.def("philox", [](uint64_t seed, uint64_t offset, uint64_t block) {
    const qcsbm::Words r = qcsbm::philox(seed, offset, block);
    return std::tuple(r.w[0], r.w[1], r.w[2], r.w[3]);
  });
  m.def("uniform", [](uint32_t word) { return qcsbm::uniform(word); });
  m.def("box_muller", [](uint32_t a, uint32_t b) {
    float z0, z1;
    qcsbm::box_muller(a, b, z0, z1);
    return std::tuple(z0, z1);
  });
  m.def("bfloat16", [](float x) { return qcsbm::load(qcsbm::store<qcsbm::bfloat16>(x)); });
  m.def("activation", &activation<double>);
  m.def("activation_float", &activation<float>);
}
