// The kernels of a step loop with their arguments bound once: one method per op, the same nouns, the same launchers.
//
// A call of an op through torch costs some 5 us before the kernel runs, a call here 0.3: at small states that is the
// solver. The caller owns all memory and keeps it alive; addresses are checked where they are bound, not at every step.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "dtype.h"
#include "leaves.h"

namespace odenet {

using Address = std::uintptr_t;
using Addresses = std::vector<Address>;

struct StepperSetup {
  std::vector<int> dtypes;  // DType of each leaf; stage times have the real type of the first
  int32_t device;           // CUDA device, or kCpu
  int64_t rows;
  std::vector<int64_t> columns;  // of each leaf; the last `quadratures` leaves have slopes but no stages
  int quadratures;
  std::vector<double> signs;  // of the slopes of each leaf: -1 where they are given for the opposite direction of time
  std::vector<std::vector<double>> a;  // rows of all stages after the first; the last is y1
  std::vector<double> b, c, e;
  std::vector<double> rtol, atol;  // one a leaf that counts in the error norm
  std::vector<double> p;           // [stages, degree]
  int degree;
  std::vector<double> controller;
};

// A linear combination of slopes without its zeros.
struct Combination {
  std::vector<int> stage;
  std::vector<double> weight;
};

// The setup, checked and in the form in which kernels are called: made once for all solves of a kind.
struct StepperTables {
  explicit StepperTables(StepperSetup setup);

  const StepperSetup setup;
  int stages, leaves, state_leaves;
  std::vector<Combination> a;
  Combination b, e;
};

class Stepper {
 public:
  explicit Stepper(std::shared_ptr<const StepperTables> tables);

  // Solver state [kNumFields, rows], stops [2, num_stops], output times [num_outputs]; own: each row has its own stops
  // and times, [rows, ...]. workspace: float64 [workspace_size()], zero.
  void bind_state(Address state, Address stops, int64_t num_stops, Address t, int64_t num_outputs, bool own,
                  Address workspace);
  int64_t workspace_size() const;
  void bind_dt(Address dt);  // [rows]; that of the solver state unless bound
  // y0: [leaves]; y: stage-major, [stages - 1, leaves without quadratures]; q1: [quadratures]; times: [stages, rows].
  void bind_buffers(const Addresses& y0, const Addresses& y, const Addresses& q1, Address times);
  void bind_times(Address times);
  // Another step of a grid: its size [rows], where it begins and where it ends, each [leaves].
  void bind_step(Address dt, const Addresses& y0, const Addresses& y1);
  void bind_slopes(int stage, const Addresses& k);  // [leaves]; 0 keeps what was there

  void stage(int i, const Addresses& k);  // k: the slopes of stage i - 1; then Y_i
  void error(const Addresses& k);  // k: the slopes of the last stage; then the quadratures' ends and the error ratio
  void quadrature(const Addresses& k);  // the same without the error
  void step_size();
  void error_and_step_size(const Addresses& k);
  // Of the first step. out [rows]: the norm of sum_j weights[j] x[j], scaled by the tolerance at y0; one: ones [rows].
  void norm(Address out, Address one, const std::vector<double>& weights, const std::vector<Addresses>& x);
  void euler();  // Y_1 = y0 + dt k_0
  void first_step(Address norms, double size, int phase);
  void dense_output(const Addresses& ys);
  void advance();            // rows move on where their step was accepted
  void advance_and_stage();  // and then the first stage of the next step, in the same launch
  void swap_ends();          // y1 becomes y0 without a copy

 private:
  void add_combination(StageLeaves& leaves, int leaf, Address y, Address y0, const Combination& row) const;
  template <class Slope>
  void add_error(ErrorLeaves& leaves, int leaf, Address y1, Address dt, const std::vector<double>& e,
                 const Slope& slope_of) const;
  ErrorLeaves error_leaves() const;
  StepSize step_size_args() const;
  DType dtype(int leaf) const { return static_cast<DType>(setup_.dtypes[leaf]); }
  double* field(Field name) const { return reinterpret_cast<double*>(state_) + name * setup_.rows; }
  Address& slope(int leaf, int stage) { return k_[leaf * stages_ + stage]; }
  Address slope(int leaf, int stage) const { return k_[leaf * stages_ + stage]; }
  Address end_of(int leaf) const;
  Address& end_of(int leaf);
  void launch_advance(bool with_stage);

  std::shared_ptr<const StepperTables> tables_;
  const StepperSetup& setup_;
  const int stages_, leaves_, state_leaves_;
  const std::vector<Combination>& a_;
  const Combination &b_, &e_;
  Address state_ = 0, dt_ = 0, stops_ = 0, t_ = 0, times_ = 0, workspace_ = 0;
  int64_t num_stops_ = 0, num_outputs_ = 0;
  bool own_ = false;
  Addresses y0_, y_, q1_, k_;
};

}  // namespace odenet
