// What the host hands over to a compiled field.
#pragma once

#include "step_size.h"

namespace odenet {

// The events of a solve that has some, see events.h.
struct EventCall {
  double* t;       // [capacity, batch]: of the first, the second, ... of each sample
  void* y;         // [capacity, batch, state]: ahead of what they change
  int64_t* index;  // [capacity, batch]: which they are
  int64_t* count;  // [batch]: how many there were, also beyond the capacity; -1: a value was not a number
  double* signs;   // [batch, events]: with which the functions begin, NaN: that of their values; then as after the last
  int64_t capacity;
  int64_t most;  // the last of so many ends the sample
};

// One solve, as the host hands it over. Numbers of the state's type come as void*.
struct SolveCall {
  const void* y0;                // [batch, state]
  const void* arguments;         // [batch, arguments]
  const void* const* constants;  // what the field depends on besides: weights, each an array
  const double* rtol;            // [leaves]
  const double* atol;
  StepSize step;  // state: [kNumFields, rows], read at the start if resumed, written at the end
  double first_step;
  void* ys;             // [num_outputs, batch, state]; the first is y0
  void* y_last;         // [batch, state]
  const double* nodes;  // [num_nodes]: the grid of a method without step control
  void* tiles;          // [places, groups] what is kept between calls, see tile_bytes
  void* tape;           // [places, groups, capacity] records of accepted steps, or null
  int64_t* tape_count;  // [places, groups] steps that the tape should hold
  double* sums;         // of joint control: of each tile, or twice of each block, the sums [3, leaves]
  // Gradients, of a solve backwards.
  const void* grad_ys;   // [num_outputs, batch, state]
  void* grad_y0;         // [batch, state]
  void* grad_arguments;  // [batch, arguments]
  void* grad_constants;  // [chunks, grad_size]: each chunk of tiles adds to its own
  int64_t chunk;         // tiles of a chunk; on the way back, places
  int64_t places;        // of tiles; under per-sample control, of packs through whose lanes the samples of a chunk go
  int64_t grain;         // chunks below which a second thread costs more than it brings
  int64_t grad_size;
  int64_t batch, num_nodes, capacity;
  int64_t max_steps;  // steps to try in this call
  int64_t begun;      // steps tried before; 0: the solve begins
  EventCall events;
};

}  // namespace odenet
