// The only place with torch headers: schemas, checks, device and stream; then launch.h.
//
// Every op writes into tensors that the caller owns and returns nothing. Lists hold the leaves of a state; slopes come
// leaf-major, k[leaf * slots + j], where `slots` may exceed the number of coefficients: the surplus is not read.
// All tensors of a leaf have its shape; [rows, columns] is read off `rows` = numel of dt (or of the state's row).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "dtype.h"
#include "leaves.h"

namespace odenet {
namespace {

using torch::headeronly::ScalarType;
using torch::headeronly::toString;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// ---- messages and checks: argument, rule, value
// ----------------------------------------------------------------------

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

std::string shape(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << ']';
  return text.str();
}

std::string strides(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.stride(d);
  text << ']';
  return text.str();
}

bool same_shape(const Tensor& x, const Tensor& y) {
  if (x.dim() != y.dim()) return false;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) != y.size(d)) return false;
  }
  return true;
}

// What every tensor of leaf `leaf` must match.
void check_like(const char* name, size_t index, const Tensor& tensor, const char* like_name, size_t leaf,
                const Tensor& like) {
  if (!same_shape(tensor, like)) {
    fail(name, '[', index, "] must have the shape of ", like_name, '[', leaf, "], ", shape(like), ", got ",
         shape(tensor));
  }
  if (tensor.scalar_type() != like.scalar_type())
    fail(name, '[', index, "] must have the dtype of ", like_name, '[', leaf, "], ", toString(like.scalar_type()),
         ", got ", toString(tensor.scalar_type()));
  if (tensor.is_cpu() != like.is_cpu() || tensor.get_device_index() != like.get_device_index()) {
    fail(name, '[', index, "] must be on the device of ", like_name, '[', leaf, "]");
  }
}

void check_count(const char* name, size_t count, const char* rule, size_t expected) {
  if (count != expected) fail(name, " must hold ", rule, ", ", expected, ", got ", count);
}

void check_written(const char* name, size_t index, const Tensor& tensor) {
  if (!tensor.is_contiguous())
    fail(name, '[', index, "] is written and must be contiguous, got strides ", strides(tensor));
}

// A float64 tensor of `numel` elements on the device of `like`.
double* check_state(const char* name, const Tensor& tensor, int64_t numel, const Tensor* like = nullptr) {
  if (tensor.scalar_type() != ScalarType::Double) fail(name, " must be float64, got ", toString(tensor.scalar_type()));
  if (tensor.numel() != numel) fail(name, " must have ", numel, " elements, got ", tensor.numel());
  if (!tensor.is_contiguous()) fail(name, " must be contiguous, got strides ", strides(tensor));
  if (like && (tensor.is_cpu() != like->is_cpu() || tensor.get_device_index() != like->get_device_index())) {
    fail(name, " must be on the device of the state's leaves");
  }
  return static_cast<double*>(tensor.data_ptr());
}

// Rows of a leaf: its elements are dealt evenly among them, samples on axis 0.
int64_t check_columns(const char* name, size_t leaf, const Tensor& tensor, int64_t rows) {
  if (rows == 1) return tensor.numel();
  if (tensor.dim() == 0 || tensor.size(0) != rows) {
    fail(name, '[', leaf, "] must have ", rows, " samples on axis 0, got shape ", shape(tensor));
  }
  return rows == 0 ? 0 : tensor.numel() / rows;
}

int check_stages(const char* name, size_t coefficients) {
  if (coefficients > kMaxStages) fail(name, " must hold at most ", kMaxStages, " coefficients, got ", coefficients);
  return static_cast<int>(coefficients);
}

// ---- dispatch
// --------------------------------------------------------------------------------------------------------

int32_t device_of(const Tensor& tensor) {
  return tensor.is_cpu() ? kCpu : tensor.get_device_index();
}

DType dtype_of(const char* name, size_t leaf, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::ComplexFloat:
      return DType::complex64;
    case ScalarType::ComplexDouble:
      return DType::complex128;
    default:
      fail(name, '[', leaf, "] must be of a floating or complex type of 16 to 128 bits, got ",
           toString(tensor.scalar_type()));
  }
}

// Times have a real type.
DType dtype_of_times(const Tensor& times) {
  const DType type = dtype_of("times", 0, times);
  if (type == DType::complex64 || type == DType::complex128) {
    fail("times must be real, got ", toString(times.scalar_type()));
  }
  return type;
}

// ---- leaves
// ----------------------------------------------------------------------------------------------------------

// Read-only tensors of one call, made contiguous where they are not, and kept alive until it ends.
class Inputs {
 public:
  template <class T>
  const T* pointer(const Tensor& tensor) {
    if (tensor.is_contiguous()) return static_cast<const T*>(tensor.data_ptr());
    copies_.push_back(torch::stable::contiguous(tensor));
    return static_cast<const T*>(copies_.back().data_ptr());
  }

  // Fills k and the coefficients with the slopes of `leaf` whose coefficient is not zero; returns their number.
  template <class T>
  int slopes(const Tensors& k, const std::vector<double>& coefficients, size_t leaf, size_t slots,
             const char* like_name, const Tensor& like, const T* (&to)[kMaxStages], double (&weights)[kMaxStages]) {
    int count = 0;
    for (size_t j = 0; j < coefficients.size(); ++j) {
      if (coefficients[j] == 0) continue;
      const size_t index = leaf * slots + j;
      check_like("k", index, k[index], like_name, leaf, like);
      to[count] = pointer<T>(k[index]);
      weights[count++] = coefficients[j];
    }
    return count;
  }

 private:
  Tensors copies_;
};

size_t check_slots(const Tensors& k, size_t leaves, size_t coefficients) {
  const size_t slots = leaves ? k.size() / leaves : 0;
  if (slots * leaves != k.size())
    fail("k must hold as many slopes for each of the ", leaves, " leaves, got ", k.size());
  if (coefficients > slots) fail("k must hold ", coefficients, " slopes a leaf, one a coefficient, got ", slots);
  return slots;
}

// ---- ops
// -------------------------------------------------------------------------------------------------------------

void stage(Tensors y, Tensors y0, Tensors k, std::vector<double> a, Tensor dt) {
  const int64_t rows = dt.numel();
  if (!y0.empty()) check_count("y0", y0.size(), "one tensor a leaf, or none", y.size());
  check_stages("a", a.size());
  const size_t slots = check_slots(k, y.size(), a.size());
  Inputs inputs;
  StageLeaves leaves;
  for (size_t leaf = 0; leaf < y.size(); ++leaf) {
    visit_real(dtype_of("y", leaf, y[leaf]), [&]<class T>(T, int parts) {
      Stage<T>& s = leaves.add<T>();
      s.rows = rows;
      s.columns = check_columns("y", leaf, y[leaf], rows) * parts;
      s.dt = check_state("dt", dt, rows, &y[leaf]);
      check_written("y", leaf, y[leaf]);
      s.y = static_cast<T*>(y[leaf].data_ptr());
      if (!y0.empty()) {
        check_like("y0", leaf, y0[leaf], "y", leaf, y[leaf]);
        s.y0 = inputs.pointer<T>(y0[leaf]);
      }
      s.stages = inputs.slopes(k, a, leaf, slots, "y", y[leaf], s.k, s.a);
    });
  }
  if (!y.empty()) launch(device_of(y[0]), leaves);
}

void error(Tensor ratio, Tensors y0, Tensors y1, Tensors k, std::vector<double> e, Tensor dt, std::vector<double> rtol,
           std::vector<double> atol) {
  const int64_t rows = dt.numel();
  check_count("y1", y1.size(), "one tensor a leaf", y0.size());
  check_count("rtol", rtol.size(), "one number a leaf", y0.size());
  check_count("atol", atol.size(), "one number a leaf", y0.size());
  check_stages("e", e.size());
  const size_t slots = check_slots(k, y0.size(), e.size());
  Inputs inputs;
  ErrorLeaves leaves;
  double* out = nullptr;
  for (size_t leaf = 0; leaf < y0.size(); ++leaf) {
    visit_type(dtype_of("y0", leaf, y0[leaf]), [&]<class T>(T) {
      Error<T>& s = leaves.add<T>();
      s.rows = rows;
      s.columns = check_columns("y0", leaf, y0[leaf], rows);
      s.dt = check_state("dt", dt, rows, &y0[leaf]);
      out = check_state("ratio", ratio, rows, &y0[leaf]);
      check_like("y1", leaf, y1[leaf], "y0", leaf, y0[leaf]);
      s.y0 = inputs.pointer<T>(y0[leaf]);
      s.y1 = inputs.pointer<T>(y1[leaf]);
      s.rtol = rtol[leaf];
      s.atol = atol[leaf];
      s.stages = inputs.slopes(k, e, leaf, slots, "y0", y0[leaf], s.k, s.e);
    });
  }
  if (y0.empty()) return;
  const int32_t device = device_of(y0[0]);
  const int64_t size = workspace_of(device, leaves);
  const Tensor workspace = size ? torch::stable::new_empty(ratio, {size}) : ratio;
  launch(device, leaves, out, static_cast<double*>(workspace.data_ptr()));
}

// Output times, of all rows or each row's own. Gives how many there are, and how far it is from a row's to the next's.
const double* check_outputs(const Tensor& t, int64_t rows, const Tensor& like, int64_t& count, int64_t& stride) {
  if (t.dim() > 2 || (t.dim() == 2 && t.size(0) != rows)) {
    fail("t must have one dimension, or shape [", rows, ", times], got ", shape(t));
  }
  count = t.dim() == 2 ? t.size(1) : t.numel();
  stride = t.dim() == 2 ? count : 0;
  return check_state("t", t, t.numel(), &like);
}

StepSize step_size_args(const Tensor& state, const Tensor& times, const Tensor& stops, const Tensor& t,
                        const std::vector<double>& c, const std::vector<double>& controller) {
  StepSize s{};
  if (state.dim() != 2 || state.size(0) != kNumFields) {
    fail("state must have shape [", static_cast<int>(kNumFields), ", rows], got ", shape(state));
  }
  s.rows = state.size(1);
  s.state = check_state("state", state, kNumFields * s.rows);
  s.stages = check_stages("c", c.size());
  if (times.dim() != 2 || times.size(0) != s.stages || times.size(1) != s.rows) {
    fail("times must have shape [", s.stages, ", ", s.rows, "], got ", shape(times));
  }
  check_written("times", 0, times);
  const bool own = stops.dim() == 3;
  if ((stops.dim() != 2 && !own) || (own && stops.size(0) != s.rows) || stops.size(own) != 2 ||
      stops.size(own + 1) < 1) {
    fail("stops must have shape [2, at least 1], or that for each of the ", s.rows, " rows, got ", shape(stops));
  }
  s.num_stops = stops.size(own + 1);
  s.stops_stride = own ? 2 * s.num_stops : 0;
  s.stops = check_state("stops", stops, stops.numel(), &state);
  s.t = check_outputs(t, s.rows, state, s.num_outputs, s.t_stride);
  check_count("controller", controller.size(), "the numbers of a Controller", kControllerSize);
  std::copy(c.begin(), c.end(), s.c);
  static_assert(std::is_trivially_copyable_v<Controller> && sizeof(Controller) == kControllerSize * sizeof(double));
  std::memcpy(&s.controller, controller.data(), sizeof(Controller));
  return s;
}

void step_size(Tensor state, Tensor times, Tensor stops, Tensor t, std::vector<double> c,
               std::vector<double> controller) {
  const StepSize s = step_size_args(state, times, stops, t, c, controller);
  visit_real(dtype_of_times(times),
             [&]<class R>(R, int) { launch(device_of(state), s, static_cast<R*>(times.data_ptr())); });
}

void first_step(Tensor state, Tensor times, Tensor norms, Tensor stops, Tensor t, std::vector<double> c,
                std::vector<double> controller, double size, int64_t phase) {
  const StepSize s = step_size_args(state, times, stops, t, c, controller);
  const FirstStep first{check_state("norms", norms, 3 * s.rows, &state), size, static_cast<int>(phase)};
  visit_real(dtype_of_times(times),
             [&]<class R>(R, int) { launch(device_of(state), s, first, static_cast<R*>(times.data_ptr())); });
}

void dense_output(Tensors ys, Tensors y0, Tensors y1, Tensors k, std::vector<double> p, int64_t degree, Tensor state,
                  Tensor t) {
  if (degree < 1 || degree > kMaxDegree || p.size() % degree != 0) {
    fail("p must hold [stages, degree] numbers with degree at most ", kMaxDegree, ", got ", p.size(), " and ", degree);
  }
  const size_t stages = p.size() / degree;
  check_stages("p", stages);
  check_count("y0", y0.size(), "one tensor a leaf", ys.size());
  check_count("y1", y1.size(), "one tensor a leaf", ys.size());
  const size_t slots = check_slots(k, ys.size(), stages);
  if (state.dim() != 2) fail("state must have shape [fields, rows], got ", shape(state));
  const int64_t rows = state.size(1);
  Inputs inputs;
  DenseOutputLeaves leaves;
  for (size_t leaf = 0; leaf < y0.size(); ++leaf) {
    visit_real(dtype_of("y0", leaf, y0[leaf]), [&]<class T>(T, int parts) {
      DenseOutput<T>& s = leaves.add<T>();
      s.rows = rows;
      s.columns = check_columns("y0", leaf, y0[leaf], rows) * parts;
      s.state = check_state("state", state, kNumFields * rows, &y0[leaf]);
      int64_t outputs = 0;
      s.t = check_outputs(t, rows, y0[leaf], outputs, s.t_stride);
      if (ys[leaf].scalar_type() != y0[leaf].scalar_type() || ys[leaf].numel() != outputs * y0[leaf].numel()) {
        fail("ys[", leaf, "] must hold ", outputs, " states of y0[", leaf, "], ", shape(y0[leaf]), ", got ",
             shape(ys[leaf]));
      }
      check_written("ys", leaf, ys[leaf]);
      s.ys = static_cast<T*>(ys[leaf].data_ptr());
      check_like("y1", leaf, y1[leaf], "y0", leaf, y0[leaf]);
      s.y0 = inputs.pointer<T>(y0[leaf]);
      s.y1 = inputs.pointer<T>(y1[leaf]);
      s.degree = static_cast<int>(degree);
      s.stages = static_cast<int>(stages);
      for (size_t j = 0; j < stages; ++j) {
        const size_t index = leaf * slots + j;
        check_like("k", index, k[index], "y0", leaf, y0[leaf]);
        s.k[j] = inputs.pointer<T>(k[index]);
      }
      std::copy(p.begin(), p.end(), s.p);
    });
  }
  if (!y0.empty()) launch(device_of(y0[0]), leaves);
}

void advance(Tensors y0, Tensors k0, Tensors y1, Tensors k1, Tensor accept) {
  const int64_t rows = accept.numel();
  check_count("k0", k0.size(), "one tensor a leaf", y0.size());
  check_count("y1", y1.size(), "one tensor a leaf", y0.size());
  check_count("k1", k1.size(), "one tensor a leaf", y0.size());
  Inputs inputs;
  AdvanceLeaves leaves;
  for (size_t leaf = 0; leaf < y0.size(); ++leaf) {
    visit_real(dtype_of("y0", leaf, y0[leaf]), [&]<class T>(T, int parts) {
      Advance<T>& s = leaves.add<T>();
      s.rows = rows;
      s.columns = check_columns("y0", leaf, y0[leaf], rows) * parts;
      s.accept = check_state("accept", accept, rows, &y0[leaf]);
      check_written("y0", leaf, y0[leaf]);
      check_written("k0", leaf, k0[leaf]);
      check_like("k0", leaf, k0[leaf], "y0", leaf, y0[leaf]);
      check_like("y1", leaf, y1[leaf], "y0", leaf, y0[leaf]);
      check_like("k1", leaf, k1[leaf], "y0", leaf, y0[leaf]);
      s.y0 = static_cast<T*>(y0[leaf].data_ptr());
      s.k0 = static_cast<T*>(k0[leaf].data_ptr());
      s.y1 = inputs.pointer<T>(y1[leaf]);
      s.k1 = inputs.pointer<T>(k1[leaf]);
    });
  }
  if (!y0.empty()) launch(device_of(y0[0]), leaves);
}

}  // namespace
}  // namespace odenet

STABLE_TORCH_LIBRARY(odenet_cuda, m) {
  m.def("stage(Tensor(a!)[] y, Tensor[] y0, Tensor[] k, float[] a, Tensor dt) -> ()");
  m.def(
      "error(Tensor(a!) ratio, Tensor[] y0, Tensor[] y1, Tensor[] k, float[] e, Tensor dt, float[] rtol, float[] atol)"
      " -> ()");
  m.def("step_size(Tensor(a!) state, Tensor(b!) times, Tensor stops, Tensor t, float[] c, float[] controller) -> ()");
  m.def(
      "first_step(Tensor(a!) state, Tensor(b!) times, Tensor norms, Tensor stops, Tensor t, float[] c,"
      " float[] controller, float size, int phase) -> ()");
  m.def(
      "dense_output(Tensor(a!)[] ys, Tensor[] y0, Tensor[] y1, Tensor[] k, float[] p, int degree, Tensor state, Tensor "
      "t)"
      " -> ()");
  m.def("advance(Tensor(a!)[] y0, Tensor(b!)[] k0, Tensor[] y1, Tensor[] k1, Tensor accept) -> ()");
}

#define ODENET_IMPL(KEY)                                      \
  STABLE_TORCH_LIBRARY_IMPL(odenet_cuda, KEY, m) {            \
    m.impl("stage", TORCH_BOX(&odenet::stage));               \
    m.impl("error", TORCH_BOX(&odenet::error));               \
    m.impl("step_size", TORCH_BOX(&odenet::step_size));       \
    m.impl("first_step", TORCH_BOX(&odenet::first_step));     \
    m.impl("dense_output", TORCH_BOX(&odenet::dense_output)); \
    m.impl("advance", TORCH_BOX(&odenet::advance));           \
  }
ODENET_IMPL(CPU)
ODENET_IMPL(CUDA)
