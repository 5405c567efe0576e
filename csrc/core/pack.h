// A pack: one number for each of several samples, the lanes. On the CPU it is a few native vectors, whose operators
// work lane by lane; with one lane it is the number itself, as it is on CUDA, where every thread is a lane.
//
// Code over packs has no branch on a number: it selects, and asks `any` where work can be left out. What is done to
// each vector is written out: a loop would keep packs in memory until late, which takes the compiler's time.
#pragma once

#include "vector.h"

namespace odenet {
namespace ODENET_LEVEL {

// What a pack is made of: its numbers, how many, the type of a comparison, and the same pack of another type.
template <class P>
struct Lanes {
  using Number = P;
  using Mask = bool;
  template <class To>
  using With = To;
  static constexpr int width = 1;
};

template <class P>
using Number = typename Lanes<P>::Number;
template <class P>
using MaskOf = typename Lanes<P>::Mask;
template <class P, class To>
using With = typename Lanes<P>::template With<To>;

template <class T>
ODENET_HD T select(bool which, const T& x, const T& y) {
  return which ? x : y;
}
ODENET_HD bool any(bool mask) {
  return mask;
}
ODENET_HD bool all(bool mask) {
  return mask;
}

ODENET_HD bool negate(bool mask) {
  return !mask;
}

// The number of one lane.
template <class T>
ODENET_HD T lane(const T& x, int) {
  return x;
}
template <class T>
ODENET_HD T lane_in_memory(const T& x, int) {
  return x;
}
template <class T>
ODENET_HD void set_lane(T& x, int, std::type_identity_t<T> value) {
  x = value;
}
template <class To, class T>
ODENET_HD To convert(const T& x) {
  return static_cast<To>(x);
}

template <class I>
ODENET_HD void add_ones(I& count, bool mask) {
  count += mask;
}

// body(i) for the lanes that are set.
template <class Body>
ODENET_HD void for_lanes(bool mask, const Body& body) {
  if (mask) body(0);
}

#if !defined(__CUDACC__)

// Integers, all bits set where true; as wide as the numbers compared.
template <class T, int W>
struct Mask {
  using Integer = IntegerOf<T>;
  using V = Vector<Integer>;
  static constexpr int vectors = W * int(sizeof(T)) / kVectorBytes;
  V v[vectors];

  Mask() = default;
  ODENET_HD Mask(bool value) { ODENET_EACH(vectors, v[h] = V{} - Integer{value}); }
  template <class U>
  ODENET_HD Mask(const Mask<U, W>& other) {
    resize<Integer, IntegerOf<U>, W>(v, other.v);
  }
};

template <class T, int W>
struct Pack {
  using V = Vector<T>;
  static constexpr int vectors = W * int(sizeof(T)) / kVectorBytes;
  static constexpr int of_vector = kVectorBytes / int(sizeof(T));
  V v[vectors];

  Pack() = default;
  ODENET_HD Pack(T value) {
    ODENET_UNROLL
    for (int h = 0; h < vectors; ++h) v[h] = value - V{};  // a zero keeps its sign
  }
  // As vectors: of its own g++ copies it in pieces of sixteen bytes.
  ODENET_HD Pack(const Pack& other) { *this = other; }
  ODENET_HD Pack& operator=(const Pack& other) {
    ODENET_EACH(vectors, v[h] = other.v[h]);
    return *this;
  }
};

template <class T, int W>
struct Lanes<Pack<T, W>> {
  using Number = T;
  using Mask = odenet::ODENET_LEVEL::Mask<T, W>;
  template <class To>
  using With = Pack<To, W>;
  static constexpr int width = W;
};

#define ODENET_PACK_OPERATOR(op)                                               \
  template <class T, int W>                                                    \
  ODENET_HD Pack<T, W> operator op(const Pack<T, W>& x, const Pack<T, W>& y) { \
    Pack<T, W> r;                                                              \
    ODENET_EACH(r.vectors, r.v[h] = x.v[h] op y.v[h]);                         \
    return r;                                                                  \
  }                                                                            \
  template <class T, int W>                                                    \
  ODENET_HD Pack<T, W> operator op(const Pack<T, W>& x, T y) {                 \
    Pack<T, W> r;                                                              \
    ODENET_EACH(r.vectors, r.v[h] = x.v[h] op y);                              \
    return r;                                                                  \
  }                                                                            \
  template <class T, int W>                                                    \
  ODENET_HD Pack<T, W> operator op(T x, const Pack<T, W>& y) {                 \
    Pack<T, W> r;                                                              \
    ODENET_EACH(r.vectors, r.v[h] = x op y.v[h]);                              \
    return r;                                                                  \
  }
ODENET_PACK_OPERATOR(+)
ODENET_PACK_OPERATOR(-)
ODENET_PACK_OPERATOR(*)
ODENET_PACK_OPERATOR(/)
#undef ODENET_PACK_OPERATOR
template <class T, int W>
ODENET_HD Pack<T, W> operator-(const Pack<T, W>& x) {
  Pack<T, W> r;
  ODENET_EACH(r.vectors, r.v[h] = -x.v[h]);
  return r;
}
template <class T, int W>
ODENET_HD Pack<T, W>& operator+=(Pack<T, W>& x, const Pack<T, W>& y) {
  return x = x + y;
}

#define ODENET_PACK_COMPARISON(op)                                             \
  template <class T, int W>                                                    \
  ODENET_HD Mask<T, W> operator op(const Pack<T, W>& x, const Pack<T, W>& y) { \
    Mask<T, W> r;                                                              \
    ODENET_EACH(r.vectors, r.v[h] = x.v[h] op y.v[h]);                         \
    return r;                                                                  \
  }                                                                            \
  template <class T, int W>                                                    \
  ODENET_HD Mask<T, W> operator op(const Pack<T, W>& x, T y) {                 \
    return x op Pack<T, W>(y);                                                 \
  }                                                                            \
  template <class T, int W>                                                    \
  ODENET_HD Mask<T, W> operator op(T x, const Pack<T, W>& y) {                 \
    return Pack<T, W>(x) op y;                                                 \
  }
ODENET_PACK_COMPARISON(<)
ODENET_PACK_COMPARISON(<=)
ODENET_PACK_COMPARISON(>)
ODENET_PACK_COMPARISON(>=)
ODENET_PACK_COMPARISON(==)
ODENET_PACK_COMPARISON(!=)
#undef ODENET_PACK_COMPARISON

#define ODENET_MASK_OPERATOR(op)                                               \
  template <class T, int W>                                                    \
  ODENET_HD Mask<T, W> operator op(const Mask<T, W>& x, const Mask<T, W>& y) { \
    Mask<T, W> r;                                                              \
    ODENET_EACH(r.vectors, r.v[h] = x.v[h] op y.v[h]);                         \
    return r;                                                                  \
  }
ODENET_MASK_OPERATOR(&)
ODENET_MASK_OPERATOR(|)
#undef ODENET_MASK_OPERATOR
template <class T, int W>
ODENET_HD Mask<T, W> operator!(const Mask<T, W>& x) {
  Mask<T, W> r;
  ODENET_EACH(r.vectors, r.v[h] = ~x.v[h]);
  return r;
}
template <class T, int W>
ODENET_HD Mask<T, W> negate(const Mask<T, W>& x) {
  return !x;
}
template <class T, int W>
ODENET_HD bool any(const Mask<T, W>& x) {
  typename Mask<T, W>::V some = x.v[0];
  ODENET_EACH_AFTER_FIRST((Mask<T, W>::vectors), some |= x.v[h]);
#if defined(__AVX512F__) && !defined(__clang__)
  using Words = Vector<long long>;
  return __builtin_ia32_ptestmq512((Words)some, (Words)some, static_cast<unsigned char>(-1)) != 0;
#elif defined(__AVX2__) && !defined(__clang__)
  using Words = Vector<long long>;
  return __builtin_ia32_ptestz256((Words)some, (Words)some) == 0;
#else
  int64_t words[kVectorBytes / 8], found = 0;
  memcpy(words, &some, sizeof(words));
  for (int i = 0; i < kVectorBytes / 8; ++i) found |= words[i];
  return found != 0;
#endif
}
template <class T, int W>
ODENET_HD bool all(const Mask<T, W>& x) {
  return !any(!x);
}

template <class T, int W>
ODENET_HD Pack<T, W> select(const Mask<T, W>& which, const Pack<T, W>& x, const Pack<T, W>& y) {
  Pack<T, W> r;
  ODENET_EACH(r.vectors, r.v[h] = which.v[h] ? x.v[h] : y.v[h]);
  return r;
}
template <class T, int W>
ODENET_HD Mask<T, W> select(const Mask<T, W>& which, const Mask<T, W>& x, const Mask<T, W>& y) {
  return (which & x) | (!which & y);
}

// A bit for each lane.
template <class T, int W>
ODENET_HD uint32_t bits_of(const Mask<T, W>& x) {
  constexpr int of_vector = kVectorBytes / int(sizeof(T));
  uint32_t bits = 0;
  ODENET_EACH((Mask<T, W>::vectors), bits |= signs<T>(x.v[h]) << (h * of_vector));
  return bits;
}

// The number of a lane: of a copy, for a variable place in x would keep it, and all that it is a part of, in memory.
template <class T, int W>
ODENET_HD T lane(const Pack<T, W>& x, int i) {
  const Pack<T, W> copy = x;
  return copy.v[i / x.of_vector][i % x.of_vector];
}
template <class T, int W>
ODENET_HD bool lane(const Mask<T, W>& x, int i) {
  return (bits_of(x) >> i & 1) != 0;
}
// The same of one that is in memory.
template <class T, int W>
ODENET_HD T lane_in_memory(const Pack<T, W>& x, int i) {
  T number;
  memcpy(&number, reinterpret_cast<const char*>(&x) + i * sizeof(T), sizeof(T));
  return number;
}
// By a comparison: a number written into memory would have to come back from there as a part of a vector.
template <class T, int W>
ODENET_HD Mask<T, W> only(int i) {
  using V = typename Mask<T, W>::V;
  Mask<T, W> r;
  ODENET_UNROLL
  for (int h = 0; h < r.vectors; ++h) {
    r.v[h] = places<T>() == V{} + static_cast<IntegerOf<T>>(i - h * (kVectorBytes / int(sizeof(T))));
  }
  return r;
}
template <class T, int W>
ODENET_HD void set_lane(Pack<T, W>& x, int i, std::type_identity_t<T> value) {
  x = select(only<T, W>(i), Pack<T, W>(value), x);
}
template <class T, int W>
ODENET_HD void set_lane(Mask<T, W>& x, int i, bool value) {
  const Mask<T, W> lane = only<T, W>(i);
  x = value ? x | lane : x & !lane;
}
template <class To, class T, int W>
ODENET_HD Pack<To, W> convert(const Pack<T, W>& x) {
  if constexpr (std::is_same_v<To, T>) {
    return x;
  } else {
    Pack<To, W> r;
    resize<To, T, W>(r.v, x.v);
    return r;
  }
}

template <class T, int W>
ODENET_HD Pack<T, W> fused(const Pack<T, W>& x, const Pack<T, W>& y, const Pack<T, W>& z) {
  Pack<T, W> r;
  ODENET_EACH(r.vectors, r.v[h] = fused(x.v[h], y.v[h], z.v[h]));
  return r;
}
template <class T, int W>
ODENET_HD Pack<T, W> fused(const Pack<T, W>& x, T y, const Pack<T, W>& z) {
  return fused(x, Pack<T, W>(y), z);
}

// Counts the lanes that are set.
template <class T, int W>
ODENET_HD void add_ones(Pack<IntegerOf<T>, W>& count, const Mask<T, W>& mask) {
  ODENET_EACH((Mask<T, W>::vectors), count.v[h] -= mask.v[h]);
}

// body(i) for the lanes that are set, in their order.
template <class T, int W, class Body>
ODENET_HD void for_lanes(const Mask<T, W>& mask, const Body& body) {
  for (uint32_t bits = bits_of(mask); bits != 0; bits &= bits - 1) body(__builtin_ctz(bits));
}

#endif  // !defined(__CUDACC__)

}  // namespace ODENET_LEVEL
}  // namespace odenet
