// The element types by number, for those who know them at run time only.
#pragma once

#include <type_traits>

#include "core/types.h"

namespace odenet {

enum class DType : int { float32, float64, float16, bfloat16, complex64, complex128 };
constexpr int kNumDTypes = 6;

// Calls visit(T{}) with the type itself.
template <class Visit>
void visit_type(DType type, const Visit& visit) {
  switch (type) {
    case DType::float32:
      return visit(float{});
    case DType::float64:
      return visit(double{});
    case DType::float16:
      return visit(Half{});
    case DType::bfloat16:
      return visit(BFloat16{});
    case DType::complex64:
      return visit(Complex<float>{});
    case DType::complex128:
      return visit(Complex<double>{});
  }
}

// The real type of the same precision: that of the parts of a complex number, or T itself.
template <class T>
using RealPart = std::conditional_t<std::is_same_v<T, Accumulate<T>>, Real<T>, T>;

// Calls visit(RealPart{}, parts) with how many of it make one element: 2 of a complex type.
template <class Visit>
void visit_real(DType type, const Visit& visit) {
  visit_type(type, [&]<class T>(T) { visit(RealPart<T>{}, static_cast<int>(sizeof(T) / sizeof(RealPart<T>))); });
}

}  // namespace odenet
