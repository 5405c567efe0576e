// Solves by dopri5 written by hand for one equation each: what a compiled field is measured against. Nothing of the package is
// included. The controller is the same: safety 0.9, factors from 0.2 to 10, at least 1 after a step accepted, exponent 1/5.

#include <cmath>
#include <cstdint>
#include <cstring>

extern "C" __attribute__((simd("notinbranch"))) float powf(float, float) noexcept;
extern "C" __attribute__((simd("notinbranch"))) double pow(double, double) noexcept;

namespace {

constexpr double a[6][6] = {{1. / 5},
                            {3. / 40, 9. / 40},
                            {44. / 45, -56. / 15, 32. / 9},
                            {19372. / 6561, -25360. / 2187, 64448. / 6561, -212. / 729},
                            {9017. / 3168, -355. / 33, 46732. / 5247, 49. / 176, -5103. / 18656},
                            {35. / 384, 0, 500. / 1113, 125. / 192, -2187. / 6784, 11. / 84}};
constexpr double e[7] = {35. / 384 - 1951. / 21600,
                         0,
                         500. / 1113 - 22642. / 50085,
                         125. / 192 - 451. / 720,
                         -2187. / 6784 + 12231. / 42400,
                         11. / 84 - 649. / 6300,
                         -1. / 60};

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = 2 * kBytes / 4;

// One number for each of several trajectories, in native vectors.
template <class T>
struct Pack {
  typedef T V __attribute__((vector_size(kBytes)));
  static constexpr int count = kLanes * int(sizeof(T)) / kBytes;
  V v[count];
};
template <class T, class F>
inline __attribute__((always_inline)) Pack<T> each(F f) {
  Pack<T> r;
#pragma GCC unroll 8
  for (int h = 0; h < Pack<T>::count; ++h) r.v[h] = f(h);
  return r;
}
template <class T>
inline Pack<T> operator+(const Pack<T>& x, const Pack<T>& y) {
  return each<T>([&](int h) { return x.v[h] + y.v[h]; });
}
template <class T>
inline Pack<T> operator-(const Pack<T>& x, const Pack<T>& y) {
  return each<T>([&](int h) { return x.v[h] - y.v[h]; });
}
template <class T>
inline Pack<T> operator*(const Pack<T>& x, const Pack<T>& y) {
  return each<T>([&](int h) { return x.v[h] * y.v[h]; });
}
template <class T>
inline Pack<T> operator/(const Pack<T>& x, const Pack<T>& y) {
  return each<T>([&](int h) { return x.v[h] / y.v[h]; });
}
template <class T>
inline Pack<T> operator*(double w, const Pack<T>& x) {
  return each<T>([&](int h) { return T(w) * x.v[h]; });
}
template <class T>
inline Pack<T> all(T value) {
  return each<T>([&](int) { return typename Pack<T>::V{} + value; });
}
template <class T>
inline Pack<T> larger(const Pack<T>& x, const Pack<T>& y) {
  return each<T>([&](int h) { return x.v[h] > y.v[h] ? x.v[h] : y.v[h]; });
}
template <class T>
inline Pack<T> magnitude(const Pack<T>& x) {
  return each<T>([&](int h) { return x.v[h] > 0 ? x.v[h] : -x.v[h]; });
}
inline double larger(double x, double y) {
  return x > y ? x : y;
}
inline double magnitude(double x) {
  return std::fabs(x);
}

template <class P>
struct Lorenz {
  static constexpr int n = 3, parameters = 0;
  static inline __attribute__((always_inline)) void slope(const P* y, const P*, P* k) {
    k[0] = 10.0 * (y[1] - y[0]);
    k[1] = 28.0 * y[0] - y[0] * y[2] - y[1];
    k[2] = y[0] * y[1] - (8.0 / 3) * y[2];
  }
};
template <class P>
struct LotkaVolterra {
  static constexpr int n = 2, parameters = 4;
  static inline __attribute__((always_inline)) void slope(const P* y, const P* p, P* k) {
    k[0] = y[0] * (p[0] - p[1] * y[1]);
    k[1] = y[1] * (p[2] * y[0] - p[3]);
  }
};

// One step: the new state, its slope in k[6], and the squares of the scaled error.
template <class E, class P>
inline __attribute__((always_inline)) P step(const P* y, const P* p, P (*k)[E::n], P* y1, const P& dt, const P& tol, P zero) {
#pragma GCC unroll 6
  for (int i = 0; i < 6; ++i) {
#pragma GCC unroll 3
    for (int n = 0; n < E::n; ++n) {
      P sum = a[i][0] * k[0][n];
#pragma GCC unroll 6
      for (int j = 1; j <= i; ++j) {
        if (a[i][j] != 0) sum = sum + a[i][j] * k[j][n];
      }
      y1[n] = y[n] + dt * sum;
    }
    E::slope(y1, p, k[i + 1]);
  }
  P squares = zero;
#pragma GCC unroll 3
  for (int n = 0; n < E::n; ++n) {
    P sum = e[0] * k[0][n];
#pragma GCC unroll 7
    for (int j = 2; j < 7; ++j) sum = sum + e[j] * k[j][n];
    const P scaled = dt * sum / (tol + tol * larger(magnitude(y[n]), magnitude(y1[n])));
    squares = squares + scaled * scaled;
  }
  return squares;
}

template <class T, template <class> class Equation>
int64_t solve_packs(const T* y0, const T* parameters, T* out, int64_t batch, double end, double tolerance) {
  using P = Pack<T>;
  using E = Equation<P>;
  int64_t tries = 0;
  for (int64_t first = 0; first < batch; first += kLanes) {
    P y[E::n], y1[E::n], k[7][E::n], p[E::parameters + 1];
    T buffer[kLanes], time[kLanes], dt[kLanes], ratio[kLanes], factor[kLanes];
    const auto load = [&](P& to, const T* from, int columns, int n) {
      for (int i = 0; i < kLanes; ++i) buffer[i] = from[(first + i < batch ? first + i : batch - 1) * columns + n];
      std::memcpy(&to, buffer, sizeof(to));
    };
    for (int n = 0; n < E::n; ++n) load(y[n], y0, E::n, n);
    for (int n = 0; n < E::parameters; ++n) load(p[n], parameters, E::parameters, n);
    for (int i = 0; i < kLanes; ++i) time[i] = 0, dt[i] = T(1e-3);
    E::slope(y, p, k[0]);
    for (bool running = true; running;) {
      P size;
      std::memcpy(&size, dt, sizeof(size));
      P squares = step<E>(y, p, k, y1, size, all<T>(T(tolerance)), all<T>(T(0)));
      std::memcpy(ratio, &squares, sizeof(ratio));
      for (int i = 0; i < kLanes; ++i) {
        if constexpr (sizeof(T) == 4) {
          factor[i] = 0.9f * powf(ratio[i] * T(1.0 / E::n) + 1e-20f, -0.1f);
        } else {
          factor[i] = 0.9 * pow(ratio[i] * T(1.0 / E::n) + 1e-30, -0.1);
        }
      }
      T accept[kLanes];
      int left = 0;
      for (int i = 0; i < kLanes; ++i) {
        const bool live = dt[i] > 0, fine = live && ratio[i] <= T(E::n);
        accept[i] = fine;
        left += live;
        T f = factor[i] < T(fine ? 1 : 0.2) ? T(fine ? 1 : 0.2) : factor[i];
        f = f > 10 ? T(10) : f;
        time[i] = fine ? time[i] + dt[i] : time[i];
        const T rest = T(end) - time[i], next = dt[i] * f;
        dt[i] = !live || rest <= T(end) * T(1e-7) ? T(0) : next < rest ? next : rest;
      }
      tries += left;
      running = false;
      for (int i = 0; i < kLanes; ++i) running |= dt[i] > 0;
      P mask;
      std::memcpy(&mask, accept, sizeof(mask));
      for (int n = 0; n < E::n; ++n) {
        y[n] = each<T>([&](int h) { return mask.v[h] > 0 ? y1[n].v[h] : y[n].v[h]; });
        k[0][n] = each<T>([&](int h) { return mask.v[h] > 0 ? k[6][n].v[h] : k[0][n].v[h]; });
      }
    }
    for (int n = 0; n < E::n; ++n) {
      std::memcpy(buffer, &y[n], sizeof(buffer));
      for (int i = 0; i < kLanes && first + i < batch; ++i) out[(first + i) * E::n + n] = buffer[i];
    }
  }
  return tries;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int64_t lorenz_one(const double* y0, double* out, double end, double tol) {
  using E = Lorenz<double>;
  double y[3] = {y0[0], y0[1], y0[2]}, y1[3], k[7][3], time = 0, dt = 1e-4;
  E::slope(y, nullptr, k[0]);
  int64_t tries = 0;
  while (time < end) {
    const bool last = time + dt >= end;
    if (last) dt = end - time;
    const double ratio = std::sqrt(step<E>(y, (const double*)nullptr, k, y1, dt, tol, 0.0) / 3);
    double factor = 0.9 * std::pow(ratio, -0.2);
    const bool fine = ratio <= 1;
    factor = factor < (fine ? 1 : 0.2) ? (fine ? 1 : 0.2) : factor > 10 ? 10 : factor;
    ++tries;
    if (fine) {
      time = last ? end : time + dt;
      std::memcpy(y, y1, sizeof(y));
      std::memcpy(k[0], k[6], sizeof(y));
    }
    dt *= factor;
  }
  std::memcpy(out, y, sizeof(y));
  return tries;
}
#define ODENET_BY_HAND(name, T, Equation)                                                                              \
  extern "C" __attribute__((visibility("default"))) int64_t name(const T* y0, const T* p, T* out, int64_t batch,       \
                                                                 double end, double tol) {                             \
    return solve_packs<T, Equation>(y0, p, out, batch, end, tol);                                                      \
  }
ODENET_BY_HAND(lorenz_float, float, Lorenz)
ODENET_BY_HAND(lorenz_double, double, Lorenz)
ODENET_BY_HAND(lotka_volterra_float, float, LotkaVolterra)
