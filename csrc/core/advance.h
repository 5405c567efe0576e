// Rows whose step was accepted move on:  y0 <- y1,  k0 <- k1 (first same as last). Rejected and ended rows stay.
#pragma once

#include "types.h"

namespace odenet {

template <class T>
struct Advance {
  T* y0;                 // [rows, columns], written
  T* k0;                 // [rows, columns], written
  const T* y1;           // [rows, columns]
  const T* k1;           // [rows, columns]
  const double* accept;  // [rows]
  int64_t rows, columns;
};

namespace ODENET_LEVEL {

template <class T>
ODENET_HD void advance_element(const Advance<T>& s, int64_t i) {
  s.y0[i] = s.y1[i];
  s.k0[i] = s.k1[i];
}

}  // namespace ODENET_LEVEL
}  // namespace odenet
