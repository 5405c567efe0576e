// End values of problems without a closed form, in 113-bit arithmetic, by extrapolation (Hairer, Norsett and Wanner I,
// II.9, and Hairer and Wanner II, IV.9): Gragg's method for those that are not stiff, the linearly implicit Euler
// method for the others. Each is solved at two tolerances and orders; the digits in which both agree are right.
//
//   g++ -O2 -std=gnu++17 benchmarks/end_values.cpp -lquadmath -o /tmp/end_values && /tmp/end_values
#include <quadmath.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <utility>
#include <vector>

using Real = __float128;
using State = std::vector<Real>;
using Field = std::function<void(Real t, const State& y, State& k)>;

// LU with partial pivoting, in place.
static std::vector<int> factorise(std::vector<State>& a) {
  const int n = static_cast<int>(a.size());
  std::vector<int> rows(n);
  for (int j = 0; j < n; ++j) {
    int best = j;
    for (int i = j + 1; i < n; ++i) best = fabsq(a[i][j]) > fabsq(a[best][j]) ? i : best;
    rows[j] = best;
    std::swap(a[j], a[best]);
    for (int i = j + 1; i < n; ++i) {
      a[i][j] /= a[j][j];
      for (int l = j + 1; l < n; ++l) a[i][l] -= a[i][j] * a[j][l];
    }
  }
  return rows;
}

static void solve(const std::vector<State>& a, const std::vector<int>& rows, State& x) {
  const int n = static_cast<int>(a.size());
  for (int j = 0; j < n; ++j) {
    std::swap(x[j], x[rows[j]]);
  }
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < i; ++j) x[i] -= a[i][j] * x[j];
  for (int i = n - 1; i >= 0; --i) {
    for (int j = i + 1; j < n; ++j) x[i] -= a[i][j] * x[j];
    x[i] /= a[i][i];
  }
}

// From y at t over h in `parts` steps, by Gragg's midpoint rule.
static State gragg(const Field& f, Real t, const State& y, Real h, int parts) {
  const size_t n = y.size();
  State last = y, now(n), k(n), next(n);
  const Real s = h / parts;
  f(t, y, k);
  for (size_t i = 0; i < n; ++i) now[i] = y[i] + s * k[i];
  for (int m = 1; m < parts; ++m) {
    f(t + m * s, now, k);
    for (size_t i = 0; i < n; ++i) next[i] = last[i] + 2 * s * k[i];
    last = now;
    now = next;
  }
  return now;
}

// The same by the linearly implicit Euler method; these fields do not depend on the time.
static State euler(const Field& f, const std::vector<State>& jac, const State& y, Real h, int parts) {
  const size_t n = y.size();
  State now = y, k(n);
  std::vector<State> a(n, State(n));
  const Real s = h / parts;
  for (size_t i = 0; i < n; ++i)
    for (size_t j = 0; j < n; ++j) a[i][j] = (i == j ? 1 : 0) - s * jac[i][j];
  const auto rows = factorise(a);
  for (int m = 0; m < parts; ++m) {
    f(0, now, k);
    for (auto& x : k) x *= s;
    solve(a, rows, k);
    for (size_t i = 0; i < n; ++i) now[i] += k[i];
  }
  return now;
}

// By central differences, which are exact here: these fields are polynomials of degree 2.
static std::vector<State> jacobian(const Field& f, const State& y) {
  const size_t n = y.size();
  std::vector<State> found(n, State(n));
  State up(n), down(n);
  for (size_t j = 0; j < n; ++j) {
    const Real step = 1e-3Q;
    State a = y, b = y;
    a[j] += step;
    b[j] -= step;
    f(0, a, up);
    f(0, b, down);
    for (size_t i = 0; i < n; ++i) found[i][j] = (up[i] - down[i]) / (a[j] - b[j]);
  }
  return found;
}

// size: below which a component counts absolutely.
static State end_of(const Field& f, State y, Real end, bool stiff, int columns, Real tol, Real size) {
  const size_t n = y.size();
  Real t = 0, h = stiff ? 1e-9Q : 1e-2Q;
  while (t < end) {
    h = fminq(h, end - t);
    std::vector<State> table(columns);
    const auto jac = stiff ? jacobian(f, y) : std::vector<State>();
    Real error = 0;
    for (int j = 0; j < columns; ++j) {
      const auto parts = [&](int i) { return stiff ? i + 2 : 2 * (i + 1); };
      std::vector<State> row(j + 1);
      row[0] = stiff ? euler(f, jac, y, h, parts(j)) : gragg(f, t, y, h, parts(j));
      for (int m = 1; m <= j; ++m) {
        Real ratio = Real(parts(j)) / parts(j - m);
        if (!stiff) ratio *= ratio;
        row[m].resize(n);
        for (size_t i = 0; i < n; ++i) row[m][i] = row[m - 1][i] + (row[m - 1][i] - table[m - 1][i]) / (ratio - 1);
      }
      if (j == columns - 1) {
        for (size_t i = 0; i < n; ++i)
          error = fmaxq(error, fabsq(row[j][i] - row[j - 1][i]) / (tol * fmaxq(fabsq(y[i]), size)));
      }
      table = row;
      table.resize(columns);
    }
    const bool good = error <= 1;
    if (good) {
      t += h;
      y = table[columns - 1];
    }
    const Real power = Real(1) / (stiff ? columns : 2 * columns - 1);
    h *= isnanq(error) ? 0.1Q : fminq(4, fmaxq(0.1Q, 0.8Q * powq(fmaxq(error, 1e-30Q), -power)));
  }
  return y;
}

static void pollu(Real, const State& y, State& k) {
  const Real r[] = {
      .35Q * y[0],          26.6Q * y[1] * y[3],  1.23e4Q * y[4] * y[1], 8.6e-4Q * y[6],         8.2e-4Q * y[6],
      1.5e4Q * y[6] * y[5], 1.3e-4Q * y[8],       2.4e4Q * y[8] * y[5],  1.65e4Q * y[10] * y[1], 9e3Q * y[10] * y[0],
      .022Q * y[12],        1.2e4Q * y[9] * y[1], 1.88Q * y[13],         1.63e4Q * y[0] * y[5],  4.8e6Q * y[2],
      3.5e-4Q * y[3],       .0175Q * y[3],        1e8Q * y[15],          4.44e11Q * y[15],       1.24e3Q * y[16] * y[5],
      2.1Q * y[18],         5.78Q * y[18],        .0474Q * y[0] * y[3],  1.78e3Q * y[18] * y[0], 3.12Q * y[19]};
  k = {-r[0] - r[9] - r[13] - r[22] - r[23] + r[1] + r[2] + r[8] + r[10] + r[11] + r[21] + r[24],
       -r[1] - r[2] - r[8] - r[11] + r[0] + r[20],
       -r[14] + r[0] + r[16] + r[18] + r[21],
       -r[1] - r[15] - r[16] - r[22] + r[14],
       -r[2] + 2 * r[3] + r[5] + r[6] + r[12] + r[19],
       -r[5] - r[7] - r[13] - r[19] + r[2] + 2 * r[17],
       -r[3] - r[4] - r[5] + r[12],
       r[3] + r[4] + r[5] + r[6],
       -r[6] - r[7],
       -r[11] + r[6] + r[8],
       -r[8] - r[9] + r[7] + r[10],
       r[8],
       -r[10] + r[9],
       -r[12] + r[11],
       r[13],
       -r[17] - r[18] + r[15],
       -r[19],
       r[19],
       -r[20] - r[21] - r[23] + r[22] + r[24],
       -r[24] + r[23]};
}

static void e5(Real, const State& y, State& k) {
  const Real a = 7.89e-10Q * y[0], b = 1.1e7Q * y[0] * y[2], c = 1.13e9Q * y[1] * y[2], d = 1.13e3Q * y[3];
  k = {-a - b, a - c, a - b - c + d, b - d};
}

// ROBER, and behind it the derivatives of its three numbers by the logarithm of each rate, 0.04, 1e4 and 3e7.
static void rober(Real, const State& y, State& k) {
  const Real a = .04Q, b = 1e4Q, c = 3e7Q;
  k.assign(12, 0);
  for (int i = 0; i < 4; ++i) {
    const Real* s = &y[3 * i];
    const Real one = a * s[0], two = i == 0 ? b * y[1] * y[2] : b * (s[1] * y[2] + y[1] * s[2]),
               three = i == 0 ? c * y[1] * y[1] : 2 * c * y[1] * s[1];
    const Real r[] = {one + (i == 1 ? a * y[0] : 0), two + (i == 2 ? b * y[1] * y[2] : 0),
                      three + (i == 3 ? c * y[1] * y[1] : 0)};
    k[3 * i] = r[1] - r[0];
    k[3 * i + 1] = r[0] - r[1] - r[2];
    k[3 * i + 2] = r[2];
  }
}

// Positions in three or two dimensions, then velocities; `sun` beside the bodies, of mass `centre`, or none.
static void bodies(const State& mass, int dims, Real strength, Real centre, const State& y, State& k) {
  const int m = static_cast<int>(mass.size()), half = m * dims;
  const auto cube = [&](const State& d) {
    Real sum = 0;
    for (Real x : d) sum += x * x;
    return sum * sqrtq(sum);
  };
  k.assign(2 * half, 0);
  std::vector<State> place(m);
  for (int i = 0; i < m; ++i) place[i] = State(y.begin() + i * dims, y.begin() + (i + 1) * dims);
  for (int i = 0; i < m; ++i) {
    for (int x = 0; x < dims; ++x) {
      k[i * dims + x] = y[half + i * dims + x];
      if (centre > 0) k[half + i * dims + x] -= strength * (centre + mass[i]) * place[i][x] / cube(place[i]);
    }
    for (int j = 0; j < m; ++j) {
      if (i == j) continue;
      State apart(dims);
      for (int x = 0; x < dims; ++x) apart[x] = place[j][x] - place[i][x];
      const Real third = cube(apart), own = centre > 0 ? cube(place[j]) : Real(1);
      for (int x = 0; x < dims; ++x)
        k[half + i * dims + x] += strength * mass[j] * (apart[x] / third - (centre > 0 ? place[j][x] / own : Real(0)));
    }
  }
}

static void show(const char* name, const Field& f, const State& y0, Real end, bool stiff, Real size) {
  const State a = end_of(f, y0, end, stiff, stiff ? 12 : 10, stiff ? 1e-16Q : 1e-25Q, size);
  const State b = end_of(f, y0, end, stiff, stiff ? 10 : 8, stiff ? 1e-15Q : 1e-23Q, size);
  Real apart = 0;
  printf("%s\n", name);
  for (size_t i = 0; i < a.size(); ++i) {
    char text[64];
    quadmath_snprintf(text, sizeof text, "%.19Qe", a[i]);
    printf("  %s\n", text);
    apart = fmaxq(apart, fabsq(a[i] - b[i]) / fmaxq(fabsq(a[i]), 1e-30Q));
  }
  printf("  relative distance of the two: %.1e\n", static_cast<double>(apart));
}

int main() {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  show(
      "DETEST E2", [](Real, const State& y, State& k) { k = {y[1], (1 - y[0] * y[0]) * y[1] - y[0]}; }, {2, 0}, 20,
      false, 1e-3Q);
  show(
      "DETEST E3",
      [](Real t, const State& y, State& k) { k = {y[1], y[0] * y[0] * y[0] / 6 - y[0] + 2 * sinq(2.78535Q * t)}; },
      {0, 0}, 20, false, 1e-3Q);
  const State planets = {.000954786104043Q, .000285583733151Q, .0000437273164546Q, .0000517759138449Q,
                         .00000277777777778Q};
  show(
      "DETEST C5", [&](Real, const State& y, State& k) { bodies(planets, 3, 2.95912208286Q, 1.00000597682Q, y, k); },
      {3.42947415189Q,   3.35386959711Q,  1.35494901715Q,  6.64145542550Q,  5.97156957878Q,  2.18231499728Q,
       11.2630437207Q,   14.6952576794Q,  6.27960525067Q,  -30.1552268759Q, 1.65699966404Q,  1.43785752721Q,
       -21.1238353380Q,  28.4465098142Q,  15.3882659679Q,  -.557160570446Q, .505696783289Q,  .230578543901Q,
       -.415570776342Q,  .365682722812Q,  .169143213293Q,  -.325325669158Q, .189706021964Q,  .0877265322780Q,
       -.0240476254170Q, -.287659532608Q, -.117219543175Q, -.176860753121Q, -.216393453025Q, -.0148647893090Q},
      20, false, 1e-3Q);
  show(
      "PLEI", [](Real, const State& y, State& k) { bodies({1, 2, 3, 4, 5, 6, 7}, 2, 1, 0, y, k); },
      {3, 3, 3, -3, -1, 2, -3, 0, 2, 0, -2, -4, 2, 4, 0, 0, 0, 0, 0, 0, 0, -1.25Q, 0, 1, 1.75Q, 0, -1.5Q, 0}, 3, false,
      1e-3Q);
  show("ROBER, and by the logarithms of its rates", rober, {1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, 40, true, 1e-8Q);
  show("POLLU", pollu, {0, .2Q, 0, .04Q, 0, 0, .1Q, .3Q, .01Q, 0, 0, 0, 0, 0, 0, 0, .007Q, 0, 0, 0}, 60, true, 1e-10Q);
  show("E5 of the stiff set", e5, {1.76e-3Q, 0, 0, 0}, 1e11Q, true, 1e-20Q);
}
