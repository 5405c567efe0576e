#include "stepper.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
namespace odenet {

namespace {

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void check(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

Combination combination_of(const std::vector<double>& weights) {
  Combination row;
  for (size_t j = 0; j < weights.size(); ++j) {
    if (weights[j] == 0) continue;
    row.stage.push_back(static_cast<int>(j));
    row.weight.push_back(weights[j]);
  }
  return row;
}

}  // namespace

StepperTables::StepperTables(StepperSetup given)
    : setup(std::move(given)),
      stages(static_cast<int>(setup.c.size())),
      leaves(static_cast<int>(setup.columns.size())),
      state_leaves(leaves - setup.quadratures) {
  check(stages >= 1 && stages <= kMaxStages, "c must have from 1 to 17 nodes");
  check(state_leaves >= 1, "columns must hold at least one leaf beside the quadratures");
  check(setup.dtypes.size() == setup.columns.size(), "dtypes must hold one entry a leaf");
  for (const int type : setup.dtypes)
    check(type >= 0 && type < kNumDTypes, "dtypes must hold numbers of element types");
  check(setup.signs.size() == setup.columns.size(), "signs must hold one number a leaf");
  check(setup.rtol.size() == setup.atol.size() && setup.rtol.size() <= setup.columns.size(),
        "rtol and atol must hold one number for each leaf in the norm");
  check(setup.degree >= 1 && setup.degree <= kMaxDegree && setup.p.size() == size_t(stages * setup.degree),
        "p must have shape [stages, degree]");
  for (const auto& weights : setup.a) {
    check(weights.size() <= size_t(stages), "a must have at most one weight a stage");
    a.push_back(combination_of(weights));
  }
  check(setup.b.size() == size_t(stages) && setup.e.size() <= size_t(stages), "b and e must have one weight a stage");
  b = combination_of(setup.b);
  e = combination_of(setup.e);
  check(setup.controller.size() == kControllerSize || setup.controller.empty(),
        "controller must hold the numbers of a Controller");
}

Stepper::Stepper(std::shared_ptr<const StepperTables> tables)
    : tables_(std::move(tables)),
      setup_(tables_->setup),
      stages_(tables_->stages),
      leaves_(tables_->leaves),
      state_leaves_(tables_->state_leaves),
      a_(tables_->a),
      b_(tables_->b),
      e_(tables_->e),
      k_(size_t(leaves_) * stages_, 0) {}

void Stepper::bind_state(Address state, Address stops, int64_t num_stops, Address t, int64_t num_outputs, bool own,
                         Address workspace) {
  state_ = state;
  dt_ = reinterpret_cast<Address>(field(kDt));
  stops_ = stops;
  num_stops_ = num_stops;
  t_ = t;
  num_outputs_ = num_outputs;
  own_ = own;
  workspace_ = workspace;
}

void Stepper::bind_dt(Address dt) {
  dt_ = dt;
}

// A counter, and what `error` needs.
int64_t Stepper::workspace_size() const {
  return setup_.device == kCpu ? 0 : 1 + workspace_of(setup_.device, error_leaves());
}

void Stepper::bind_buffers(const Addresses& y0, const Addresses& y, const Addresses& q1, Address times) {
  check(y0.size() == size_t(leaves_), "y0 must hold one address a leaf");
  check(y.size() == a_.size() * state_leaves_, "y must hold one address for each stage after the first and leaf");
  check(q1.size() == size_t(setup_.quadratures), "q1 must hold one address a quadrature");
  y0_ = y0;
  y_ = y;
  q1_ = q1;
  bind_times(times);
}

void Stepper::bind_times(Address times) {
  times_ = times;
}

void Stepper::bind_step(Address dt, const Addresses& y0, const Addresses& y1) {
  check(y0.size() == size_t(leaves_) && y1.size() == size_t(leaves_), "y0 and y1 must hold one address a leaf");
  check(y_.size() == a_.size() * state_leaves_, "bind_buffers must come first");
  bind_dt(dt);
  y0_ = y0;
  for (int leaf = 0; leaf < leaves_; ++leaf) end_of(leaf) = y1[leaf];
}

void Stepper::bind_slopes(int stage, const Addresses& k) {
  check(stage >= 0 && stage < stages_, "stage must be one of the tableau");
  check(k.empty() || k.size() == size_t(leaves_), "k must hold one address a leaf");
  for (size_t leaf = 0; leaf < k.size(); ++leaf) {
    if (k[leaf]) slope(static_cast<int>(leaf), stage) = k[leaf];
  }
}

void Stepper::add_combination(StageLeaves& leaves, int leaf, Address y, Address y0, const Combination& row) const {
  visit_real(dtype(leaf), [&]<class T>(T, int parts) {
    Stage<T>& s = leaves.add<T>();
    s.y = pointer<T>(y);
    s.y0 = pointer<const T>(y0);
    s.dt = pointer<const double>(dt_);
    s.rows = setup_.rows;
    s.columns = setup_.columns[leaf] * parts;
    s.stages = static_cast<int>(row.stage.size());
    for (int j = 0; j < s.stages; ++j) {
      s.k[j] = pointer<const T>(slope(leaf, row.stage[j]));
      s.a[j] = row.weight[j] * setup_.signs[leaf];
    }
  });
}

void Stepper::stage(int i, const Addresses& k) {
  check(i >= 1 && i <= static_cast<int>(a_.size()), "i must be a stage after the first");
  if (!k.empty()) bind_slopes(i - 1, k);
  StageLeaves leaves;
  for (int leaf = 0; leaf < state_leaves_; ++leaf) {
    add_combination(leaves, leaf, y_[(i - 1) * state_leaves_ + leaf], y0_[leaf], a_[i - 1]);
  }
  launch(setup_.device, leaves);
}

void Stepper::quadrature(const Addresses& k) {
  bind_slopes(stages_ - 1, k);
  StageLeaves leaves;
  for (int leaf = state_leaves_; leaf < leaves_; ++leaf) {
    add_combination(leaves, leaf, q1_[leaf - state_leaves_], y0_[leaf], b_);
  }
  launch(setup_.device, leaves);
}

void Stepper::euler() {
  check(!a_.empty(), "a must have a row after the first");
  const Combination row{{0}, {1.0}};
  StageLeaves leaves;
  for (int leaf = 0; leaf < state_leaves_; ++leaf) add_combination(leaves, leaf, y_[leaf], y0_[leaf], row);
  launch(setup_.device, leaves);
}

// Where the leaf is at the end of the step.
Address Stepper::end_of(int leaf) const {
  return leaf < state_leaves_ ? y_[(a_.size() - 1) * state_leaves_ + leaf] : q1_[leaf - state_leaves_];
}

Address& Stepper::end_of(int leaf) {
  return leaf < state_leaves_ ? y_[(a_.size() - 1) * state_leaves_ + leaf] : q1_[leaf - state_leaves_];
}

// slope_of(j): the address of the slope that e[j] belongs to.
template <class Slope>
void Stepper::add_error(ErrorLeaves& leaves, int leaf, Address y1, Address dt, const std::vector<double>& e,
                        const Slope& slope_of) const {
  visit_type(dtype(leaf), [&]<class T>(T) {
    Error<T>& s = leaves.add<T>();
    s.y0 = pointer<const T>(y0_[leaf]);
    s.y1 = pointer<const T>(y1);
    s.dt = pointer<const double>(dt);
    s.rtol = setup_.rtol[leaf];
    s.atol = setup_.atol[leaf];
    s.rows = setup_.rows;
    s.columns = setup_.columns[leaf];
    s.stages = static_cast<int>(e.size());
    for (int j = 0; j < s.stages; ++j) {
      s.k[j] = pointer<const T>(slope_of(j));
      s.e[j] = e[j];
    }
  });
}

ErrorLeaves Stepper::error_leaves() const {
  check(!y0_.empty(), "bind_buffers must come first");
  ErrorLeaves leaves;
  for (int leaf = 0; leaf < static_cast<int>(setup_.rtol.size()); ++leaf) {
    add_error(leaves, leaf, end_of(leaf), dt_, e_.weight, [&](int j) { return slope(leaf, e_.stage[j]); });
  }
  return leaves;
}

void Stepper::error(const Addresses& k) {
  quadrature(k);
  launch(setup_.device, error_leaves(), field(kErrorRatio), pointer<double>(workspace_) + 1);
}

void Stepper::error_and_step_size(const Addresses& k) {
  quadrature(k);
  const ErrorLeaves leaves = error_leaves();
  if (setup_.device == kCpu || leaves.num_types() != 1) {
    launch(setup_.device, leaves, field(kErrorRatio), pointer<double>(workspace_) + 1);
    step_size();
    return;
  }
  leaves.each([&]<class T>(const Error<T>* args, int count) {
    on_device(
        setup_.device, [] {},
        [&](cuda::Stream stream) {
          return cuda::error_and_step_size(args, count, pointer<double>(workspace_) + 1, pointer<unsigned>(workspace_),
                                           step_size_args(), pointer<RealPart<T>>(times_), stream);
        });
  });
}

void Stepper::norm(Address out, Address one, const std::vector<double>& weights, const std::vector<Addresses>& x) {
  check(weights.size() <= size_t(kMaxStages) && x.size() == weights.size(), "x must hold one state a weight");
  for (const Addresses& parts : x) check(parts.size() >= setup_.rtol.size(), "x must hold one address a leaf");
  ErrorLeaves leaves;
  for (int leaf = 0; leaf < static_cast<int>(setup_.rtol.size()); ++leaf) {
    add_error(leaves, leaf, y0_[leaf], one, weights, [&](int j) { return x[j][leaf]; });
  }
  launch(setup_.device, leaves, pointer<double>(out), pointer<double>(workspace_) + 1);
}

StepSize Stepper::step_size_args() const {
  StepSize s{};
  s.state = pointer<double>(state_);
  s.stops = pointer<const double>(stops_);
  s.t = pointer<const double>(t_);
  std::copy(setup_.c.begin(), setup_.c.end(), s.c);
  std::memcpy(&s.controller, setup_.controller.data(), sizeof(Controller));
  s.rows = setup_.rows;
  s.num_stops = num_stops_;
  s.num_outputs = num_outputs_;
  s.stops_stride = own_ ? 2 * num_stops_ : 0;
  s.t_stride = own_ ? num_outputs_ : 0;
  s.stages = stages_;
  return s;
}

void Stepper::step_size() {
  const StepSize s = step_size_args();
  visit_real(dtype(0), [&]<class R>(R, int) { launch(setup_.device, s, pointer<R>(times_)); });
}

void Stepper::first_step(Address norms, double size, int phase) {
  const StepSize s = step_size_args();
  const FirstStep first{pointer<const double>(norms), size, phase};
  visit_real(dtype(0), [&]<class R>(R, int) { launch(setup_.device, s, first, pointer<R>(times_)); });
}

void Stepper::dense_output(const Addresses& ys) {
  check(ys.size() == size_t(state_leaves_), "ys must hold one address a leaf");
  DenseOutputLeaves leaves;
  for (int leaf = 0; leaf < state_leaves_; ++leaf) {
    visit_real(dtype(leaf), [&]<class T>(T, int parts) {
      DenseOutput<T>& s = leaves.add<T>();
      s.ys = pointer<T>(ys[leaf]);
      s.y0 = pointer<const T>(y0_[leaf]);
      s.y1 = pointer<const T>(end_of(leaf));
      s.state = pointer<const double>(state_);
      s.t = pointer<const double>(t_);
      s.t_stride = own_ ? num_outputs_ : 0;
      for (size_t j = 0; j < setup_.p.size(); ++j) s.p[j] = setup_.p[j] * setup_.signs[leaf];
      s.stages = stages_;
      s.degree = setup_.degree;
      s.rows = setup_.rows;
      s.columns = setup_.columns[leaf] * parts;
      for (int j = 0; j < stages_; ++j) s.k[j] = pointer<const T>(slope(leaf, j));
    });
  }
  launch(setup_.device, leaves);
}

void Stepper::advance() {
  launch_advance(false);
}

void Stepper::advance_and_stage() {
  const bool of_one_slope = !a_.empty() && a_[0].stage == std::vector<int>{0};
  launch_advance(of_one_slope);
  if (!of_one_slope) stage(1, {});
}

void Stepper::launch_advance(bool with_stage) {
  AdvanceLeaves leaves;
  for (int leaf = 0; leaf < leaves_; ++leaf) {
    visit_real(dtype(leaf), [&]<class T>(T, int parts) {
      Advance<T>& s = leaves.add<T>();
      s.y0 = pointer<T>(y0_[leaf]);
      s.k0 = pointer<T>(slope(leaf, 0));
      s.y1 = pointer<const T>(end_of(leaf));
      s.k1 = pointer<const T>(slope(leaf, stages_ - 1));
      s.accept = field(kAccept);
      s.rows = setup_.rows;
      s.columns = setup_.columns[leaf] * parts;
      if (!with_stage || leaf >= state_leaves_) return;
      s.y = pointer<T>(y_[leaf]);
      s.a = a_[0].weight[0] * setup_.signs[leaf];
      s.dt = pointer<const double>(dt_);
    });
  }
  launch(setup_.device, leaves);
}

void Stepper::swap_ends() {
  for (int leaf = 0; leaf < leaves_; ++leaf) std::swap(y0_[leaf], end_of(leaf));
}

}  // namespace odenet
