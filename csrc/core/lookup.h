// What lies at a place that is computed.
#pragma once

#include "pack.h"

namespace odenet {
namespace ODENET_LEVEL {

// In each lane at(place), of the n that there are; not a number where there is none. Lanes with one place take a turn
// together: where the time decides they mostly do.
template <int n, class P, class At>
ODENET_HD P lookup(const P& place, const At& at) {
  using T = Number<P>;
  P found = P(T(NAN));
  MaskOf<P> left = (place >= P(T(0))) & (place < P(T(n)));
  for_lanes(left, [&](int i) {
    if (!lane(left, i)) return;
    const T here = lane(place, i);
    const MaskOf<P> same = left & (place == P(here));
    found = select(same, at(static_cast<int>(here)), found);
    left = left & negate(same);
  });
  return found;
}

}  // namespace ODENET_LEVEL
}  // namespace odenet
