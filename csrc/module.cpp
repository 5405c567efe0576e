// The Python module: what the build was, the layout of the solver state, and Stepper. The ops register themselves with
// torch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "guards.h"
#include "library.h"
#include "repeat.h"
#include "stepper.h"

namespace py = pybind11;
using namespace odenet;

namespace {

// One definition of the layout, in core/step_size.h; Python reads it from here.
void add_layout(py::module_& m) {
  py::dict fields, status, stops;
  fields["time"] = int{kTime};
  fields["dt"] = int{kDt};
  fields["step_end"] = int{kStepEnd};
  fields["status"] = int{kStatus};
  fields["accept"] = int{kAccept};
  fields["jumped"] = int{kJumped};
  fields["last_time"] = int{kLastTime};
  fields["last_dt"] = int{kLastDt};
  fields["accepted_dt"] = int{kAcceptedDt};
  fields["error_ratio"] = int{kErrorRatio};
  fields["inverse1"] = int{kInverse1};
  fields["inverse2"] = int{kInverse2};
  fields["num_accepted"] = int{kNumAccepted};
  fields["num_rejected"] = int{kNumRejected};
  fields["output_begin"] = int{kOutputBegin};
  fields["output_end"] = int{kOutputEnd};
  fields["next_stop"] = int{kNextStop};
  fields["steps_since_output"] = int{kStepsSinceOutput};
  fields["proposal"] = int{kProposal};
  fields["direction"] = int{kDirection};
  fields["next_size"] = int{kNextSize};
  m.attr("fields") = fields;
  m.attr("num_fields") = int{kNumFields};
  status["running"] = int{kRunning};
  status["success"] = int{kSuccess};
  status["underflow"] = int{kUnderflow};
  status["non_finite"] = int{kNonFinite};
  status["max_num_steps"] = int{kMaxSteps};
  status["outside"] = int{kOutside};
  m.attr("status") = status;
  stops["step"] = int{kStopStep};
  stops["jump"] = int{kStopJump};
  stops["end"] = int{kStopEnd};
  stops["end on jump"] = int{kStopEndJump};
  m.attr("stops") = stops;
  m.attr("max_stages") = kMaxStages;
  m.attr("max_degree") = kMaxDegree;
}

// By name, as torch calls them.
void add_dtypes(py::module_& m) {
  py::dict dtypes;
  dtypes["float32"] = int(DType::float32);
  dtypes["float64"] = int(DType::float64);
  dtypes["float16"] = int(DType::float16);
  dtypes["bfloat16"] = int(DType::bfloat16);
  dtypes["complex64"] = int(DType::complex64);
  dtypes["complex128"] = int(DType::complex128);
  m.attr("dtypes") = dtypes;
}

// The instruction sets of the CPU kernels that this machine has.
void add_machine(py::module_& m) {
  py::list levels;
  for (const Level level : machine_levels()) levels.append(name_of(level));
  m.attr("cpu_levels") = levels;
  m.def("choose_level", &choose_level);
  m.def("cpu_level", [] { return std::string(name_of(level())); });
  m.def("last_level_cache", &last_level_cache);
}

void add_build(py::module_& m) {
  m.attr("compiler") = ODENET_COMPILER;
  m.attr("torch_built_with") = ODENET_TORCH;
#ifdef ODENET_CUDA
  m.attr("cuda") = ODENET_CUDA;
  m.attr("cuda_architectures") = cuda::architectures();
#else
  m.attr("cuda") = py::none();
  m.attr("cuda_architectures") = "";
#endif
}

void add_stepper(py::module_& m) {
  using Weights = std::vector<double>;
  // Kernels run without the interpreter's lock: other Python threads go on, and an interrupt is taken note of.
  const py::call_guard<py::gil_scoped_release> unlocked;
  py::class_<StepperTables, std::shared_ptr<StepperTables>>(m, "StepperTables")
      .def(py::init([](std::vector<int> dtypes, int32_t device, int64_t rows, std::vector<int64_t> columns,
                       int quadratures, Weights signs, std::vector<Weights> a, Weights b, Weights c, Weights e,
                       Weights rtol, Weights atol, Weights p, int degree, Weights controller) {
             return std::make_shared<StepperTables>(StepperSetup{dtypes, device, rows, columns, quadratures, signs, a,
                                                                 b, c, e, rtol, atol, p, degree, controller});
           }),
           py::kw_only(), py::arg("dtypes"), py::arg("device"), py::arg("rows"), py::arg("columns"),
           py::arg("quadratures"), py::arg("signs"), py::arg("a"), py::arg("b"), py::arg("c"), py::arg("e"),
           py::arg("rtol"), py::arg("atol"), py::arg("p"), py::arg("degree"), py::arg("controller"))
      .def_property_readonly("quadratures", [](const StepperTables& tables) { return tables.setup.quadratures; });
  py::class_<Stepper>(m, "Stepper")
      .def(py::init([](std::shared_ptr<StepperTables> tables) { return std::make_unique<Stepper>(std::move(tables)); }))
      .def("bind_state", &Stepper::bind_state)
      .def("bind_dt", &Stepper::bind_dt)
      .def("workspace_size", &Stepper::workspace_size)
      .def("bind_buffers", &Stepper::bind_buffers)
      .def("bind_times", &Stepper::bind_times)
      .def("bind_step", &Stepper::bind_step)
      .def("bind_slopes", &Stepper::bind_slopes)
      .def("stage", &Stepper::stage, unlocked)
      .def("error", &Stepper::error, unlocked)
      .def("error_and_step_size", &Stepper::error_and_step_size, unlocked)
      .def("quadrature", &Stepper::quadrature, unlocked)
      .def("step_size", &Stepper::step_size, unlocked)
      .def("norm", &Stepper::norm, unlocked)
      .def("euler", &Stepper::euler, unlocked)
      .def("first_step", &Stepper::first_step, unlocked)
      .def("dense_output", &Stepper::dense_output, unlocked)
      .def("advance", &Stepper::advance, unlocked)
      .def("advance_and_stage", &Stepper::advance_and_stage, unlocked)
      .def("swap_ends", &Stepper::swap_ends);
}

// A compiled field and the arguments of its solves, made once for each kind. Addresses come as numbers, and what they
// point to is the caller's.
void add_library(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> unlocked;
  py::class_<Library>(m, "Library")
      .def(py::init<const std::string&>())
      .def_property_readonly("lanes", &Library::lanes)
      .def_property_readonly("tile_bytes", &Library::tile_bytes)
      .def_property_readonly("record_bytes", &Library::record_bytes)
      .def_property_readonly("team", &Library::team)
      .def_property_readonly("groups", &Library::groups)
      .def("run", &Library::run, unlocked)
      .def(
          "launch",
          [](const Library& library, const SolveCall& call, int32_t device, Address left) {
            library.launch(call, device, reinterpret_cast<unsigned long long*>(left));
          },
          unlocked)
      .def("resident", &Library::resident);
  py::class_<SolveCall>(m, "SolveCall")
      .def(py::init([](Address rtol, Address atol, Address stops, int64_t num_stops, Address t, int64_t num_outputs,
                       bool own, Address nodes, int64_t num_nodes, int64_t rows, const std::vector<double>& controller,
                       double first_step, int64_t batch, int64_t chunk, int64_t places, int64_t grain) {
             SolveCall in{};
             in.rtol = reinterpret_cast<const double*>(rtol);
             in.atol = reinterpret_cast<const double*>(atol);
             in.step.stops = reinterpret_cast<const double*>(stops);
             in.step.num_stops = num_stops;
             in.step.t = reinterpret_cast<const double*>(t);
             in.step.num_outputs = num_outputs;
             in.step.stops_stride = own ? 2 * num_stops : 0;
             in.step.t_stride = own ? num_outputs : 0;
             in.step.rows = rows;
             if (controller.size() != kControllerSize) throw std::invalid_argument("controller has a wrong size");
             memcpy(&in.step.controller, controller.data(), sizeof(Controller));
             in.nodes = reinterpret_cast<const double*>(nodes);
             in.num_nodes = num_nodes;
             in.first_step = first_step;
             in.batch = batch;
             in.chunk = chunk;
             in.places = places;
             in.grain = grain;
             return in;
           }),
           py::kw_only(), py::arg("rtol"), py::arg("atol"), py::arg("stops"), py::arg("num_stops"), py::arg("t"),
           py::arg("num_outputs"), py::arg("own"), py::arg("nodes"), py::arg("num_nodes"), py::arg("rows"),
           py::arg("controller"), py::arg("first_step"), py::arg("batch"), py::arg("chunk"), py::arg("places"),
           py::arg("grain"))
      .def(
          "on",
          [](const SolveCall& kind, Address y0, Address ys, Address y_last, Address state, Address arguments,
             Address constants, Address tiles, Address sums) {
            SolveCall in = kind;
            in.y0 = reinterpret_cast<const void*>(y0);
            in.ys = reinterpret_cast<void*>(ys);
            in.y_last = reinterpret_cast<void*>(y_last);
            in.step.state = reinterpret_cast<double*>(state);
            in.arguments = reinterpret_cast<const void*>(arguments);
            in.constants = reinterpret_cast<const void* const*>(constants);
            in.tiles = reinterpret_cast<void*>(tiles);
            in.sums = reinterpret_cast<double*>(sums);
            return in;
          },
          "One solve of this kind, on memory of its own.")
      .def("bind_tape",
           [](SolveCall& in, Address tape, Address count, int64_t capacity) {
             in.tape = reinterpret_cast<void*>(tape);
             in.tape_count = reinterpret_cast<int64_t*>(count);
             in.capacity = capacity;
           })
      .def("bind_gradients",
           [](SolveCall& in, Address ys, Address y0, Address arguments, Address constants, int64_t size) {
             in.grad_ys = reinterpret_cast<const void*>(ys);
             in.grad_y0 = reinterpret_cast<void*>(y0);
             in.grad_arguments = reinterpret_cast<void*>(arguments);
             in.grad_constants = reinterpret_cast<void*>(constants);
             in.grad_size = size;
           })
      .def("bind_events",
           [](SolveCall& in, Address t, Address y, Address index, Address count, Address signs, int64_t capacity,
              int64_t most) {
             in.events.t = reinterpret_cast<double*>(t);
             in.events.y = reinterpret_cast<void*>(y);
             in.events.index = reinterpret_cast<int64_t*>(index);
             in.events.count = reinterpret_cast<int64_t*>(count);
             in.events.signs = reinterpret_cast<double*>(signs);
             in.events.capacity = capacity;
             in.events.most = most;
           })
      .def("plan", [](SolveCall& in, int64_t begun, int64_t max_steps) {
        in.begun = begun;
        in.max_steps = max_steps;
      });
}

// A captured step, made again and again in one launch.
void add_repeat(py::module_& m) {
  py::class_<Repeat>(m, "Repeat")
      .def(py::init<Address, Address, int64_t, Address, int64_t, int32_t>(), py::kw_only(), py::arg("step"),
           py::arg("status"), py::arg("rows"), py::arg("left"), py::arg("steps"), py::arg("device"))
      .def("launch", &Repeat::launch);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  add_layout(m);
  add_dtypes(m);
  add_build(m);
  add_machine(m);
  add_stepper(m);
  add_library(m);
  add_repeat(m);
  if (add_guards(m.ptr()) != 0) throw py::error_already_set();
}
