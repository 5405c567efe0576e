// Functions of packs and of numbers against the C library in a wider type: the largest error, in units in the last
// place of the result, and whether a number alone has the bits of a lane. Argument: every how many floats one is tried.
#define ODENET_ONE_LANE

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "core/functions.h"

namespace odenet {
namespace ODENET_LEVEL {

constexpr double kWrong = 1e30;  // not a number, infinite, or a zero of the other sign, where the other is not

template <class T>
double units(T found, long double expected) {
  if (expected != expected || found != found) return expected != expected && found != found ? 0 : kWrong;
  const T rounded = T(expected);
  if (std::isinf(rounded) || std::isinf(found)) return rounded == found ? 0 : kWrong;
  if (rounded == 0 && found == 0) return std::signbit(rounded) == std::signbit(found) ? 0 : kWrong;
  int exponent;
  std::frexp(rounded, &exponent);
  if (exponent < std::numeric_limits<T>::min_exponent) exponent = std::numeric_limits<T>::min_exponent;
  return double(fabsl((long double)found - expected) / ldexpl(1, exponent - std::numeric_limits<T>::digits));
}

// The floats, each `stride`th, and some that are special.
std::vector<float> arguments(float, uint64_t stride) {
  std::vector<float> x;
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += stride) x.push_back(bit_cast<float>(uint32_t(bits)));
  for (float special :
       {0.f, 1.f, 0x1p-149f, 0x1p-126f, 0x1.fffffcp-127f, 0x1.fffffep127f, float(INFINITY), float(NAN)}) {
    x.push_back(special), x.push_back(-special);
  }
  return x;
}
// Doubles of all sizes, near multiples of pi / 2, and in the range in which a result is neither 0 nor infinite.
std::vector<double> arguments(double, uint64_t stride) {
  std::mt19937_64 random(1);
  std::vector<double> x;
  for (uint64_t n = (uint64_t{1} << 32) / stride / 8; n > 0; --n) {
    const double share = double(random() >> 11) * 0x1p-53, sign = random() % 2 ? 1 : -1;
    x.push_back(bit_cast<double>(random()));
    x.push_back(sign * std::ldexp(1 + share, int(random() % 80) - 60));
    x.push_back(1.5707963267948966 * double(random() % 1000000) * (1 + double(random() % 9) * 0x1p-52));
    x.push_back(1500 * share - 750);
  }
  for (double special :
       {0., 1., 0x1p-1074, 0x1p-1022, 0x1.ffffffffffffep-1023, 0x1.fffffffffffffp1023, double(INFINITY), double(NAN),
        709.782712893384, 709.7827128933841, 745.1332191019411, 745.1332191019412, 1e8, 1e22}) {
    x.push_back(special), x.push_back(-special);
  }
  return x;
}

template <class T, class OfPack, class OfNumber, class Expected>
void compare(const char* name, uint64_t stride, const OfPack& of_pack, const OfNumber& of_number,
             const Expected& expected) {
  using P = Pack<T, kWidth<T>>;
  std::vector<T> x = arguments(T(0), stride);
  x.resize((x.size() + kWidth<T> - 1) / kWidth<T> * kWidth<T>);
  double worst = 0;
  T at = 0;
  int64_t differ = 0;
  uint64_t digest = 0;
  for (size_t begin = 0; begin < x.size(); begin += kWidth<T>) {
    P pack;
    memcpy(&pack, &x[begin], sizeof(pack));
    pack = of_pack(pack);
    for (int i = 0; i < kWidth<T>; ++i) {
      const T found = lane(pack, i), alone = of_number(x[begin + i]);
      const double error = units(found, expected(x[begin + i]));
      if (error > worst) worst = error, at = x[begin + i];
      using Bits = std::make_unsigned_t<IntegerOf<T>>;
      const bool number = found == found;
      differ += number ? bit_cast<Bits>(found) != bit_cast<Bits>(alone) : alone == alone;
      digest = digest * 31 + (number ? bit_cast<Bits>(found) : 0);
    }
  }
  std::printf("%s %s %.3g %.17g %lld %016llx\n", name, sizeof(T) == 4 ? "float" : "double", worst, double(at),
              (long long)(differ), (unsigned long long)(digest));
}

#define COMPARE(name, of_double, of_long)                                                     \
  compare<float>(                                                                             \
      #name, stride, [](const auto& x) { return name(x); }, [](float x) { return name(x); },  \
      [](double x) { return of_double; });                                                    \
  compare<double>(                                                                            \
      #name, stride, [](const auto& x) { return name(x); }, [](double x) { return name(x); }, \
      [](long double x) { return of_long; });
#define COMPARE_WITH(name) COMPARE(name, ::name(x), ::name##l(x))

void run(uint64_t stride) {
  COMPARE_WITH(exp)
  COMPARE_WITH(exp2)
  COMPARE_WITH(expm1)
  COMPARE_WITH(log)
  COMPARE_WITH(log2)
  COMPARE_WITH(log10)
  COMPARE_WITH(log1p)
  COMPARE_WITH(sin)
  COMPARE_WITH(cos)
  COMPARE_WITH(tan)
  COMPARE_WITH(asin)
  COMPARE_WITH(acos)
  COMPARE_WITH(atan)
  COMPARE_WITH(sinh)
  COMPARE_WITH(cosh)
  COMPARE_WITH(tanh)
  COMPARE_WITH(asinh)
  COMPARE_WITH(acosh)
  COMPARE_WITH(atanh)
  COMPARE_WITH(erf)
  COMPARE_WITH(erfc)
  COMPARE(sigmoid, 1 / (1 + ::exp(-x)), 1 / (1 + ::expl(-x)))
}

}  // namespace ODENET_LEVEL
}  // namespace odenet

int main(int, char** arguments) {
  odenet::ODENET_LEVEL::run(std::strtoull(arguments[1], nullptr, 10));
}
