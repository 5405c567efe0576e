// Events: zeros of functions of (t, y) along the solve of a sample, which end it or change its state; event.py says
// what is seen of them. The signs are looked at at the ends of the parts of every step. In the first part in which one
// changes the zero is found on the step's interpolant, and the step then ends there.
#pragma once

#include "lanes.h"
#include "tile.h"

namespace odenet {
namespace ODENET_LEVEL {

constexpr int kParts = 4;      // of a step, as solvers/events.py has them
constexpr int kTogether = 64;  // units in the last place of the time, that events at one time are apart, as there

// What the samples in the lanes of a pack have come upon.
template <class M, class P>
struct Happened {
  P sign[M::events + 1];           // of the last value of each function that was not zero; 0: there is none
  P which;                         // the event in the last step
  P next[M::events + 1];           // with which sign each goes on from there; not a number: that of its value
  int64_t count[Lanes<P>::width];  // events so far; -1: a value was not a number, and the sample has ended
};

// -1, 0 or 1; or not a number, where x is none.
template <class P>
ODENET_HD P sign_of(const P& x) {
  using T = Number<P>;
  const P sign = select(x > P(T(0)), P(T(1)), P(T(-1)));
  return select((x == P(T(0))) | negate(x == x), x, sign);
}

template <class M, class P>
struct Events {
  using T = Number<P>;
  using D = With<P, double>;
  const SolveCall& in;
  Tile<M, P>& x;
  Paces<P>& c;
  Places<P>& at;
  Happened<M, P>& happened;

  // Samples begin in these lanes at this time.
  ODENET_HD void begin(const MaskOf<P>& begun, const P& time) const {
    for_lanes(begun, [&](int i) { happened.count[i] = 0; });
    look(begun, time);
    for_lanes(begun, [&](int i) {
      for (int e = 0; e < M::events; ++e) {
        const double sign = in.events.signs[at.sample[i] * M::events + e];
        if (sign == sign) set_lane(happened.sign[e], i, static_cast<T>(sign));
      }
    });
  }

  // After the step of lanes that have accepted it: those in which an event comes. Their step ends there.
  ODENET_HD MaskOf<P> find(const MaskOf<P>& accept, const P& dt) const {
    P before[M::events], low(T(0));
    for (int e = 0; e < M::events; ++e) before[e] = happened.sign[e];
    MaskOf<P> crossed(false), undefined(false);
    for (int part = 0; part < kParts; ++part) {
      P y[kOwn<M>], values[M::events];
      const P theta = T(part + 1) / T(kParts);
      values_at(theta, time_at(theta), dt, y, values);
      MaskOf<P> here(false);
      for (int e = 0; e < M::events; ++e) {
        const P sign = sign_of(values[e]);
        undefined = undefined | (negate(sign == sign) & accept & negate(crossed));
        here = here | (counts(e, before[e]) & negate(sign == before[e]));
      }
      here = (here | undefined) & accept & negate(crossed);
      set(here, low, P(T(part) / T(kParts)));
      crossed = crossed | here;
      for (int e = 0; e < M::events; ++e) {
        set(negate(crossed) & negate(values[e] == P(T(0))), before[e], sign_of(values[e]));
      }
    }
    for (int e = 0; e < M::events; ++e) set(accept & negate(crossed), happened.sign[e], before[e]);
    if (any(crossed)) end_at_zero(crossed, undefined, low, before, dt);
    return crossed;
  }

  // Notes the event of a lane. Returns whether it is the last of its sample.
  ODENET_HD bool note(int i) const {
    const EventCall& call = in.events;
    at.since[i] = c.tries;
    int64_t& count = happened.count[i];
    if (count < 0) return true;
    const int which = static_cast<int>(lane(happened.which, i));
    for (int e = 0; e < M::events; ++e) {
      call.signs[at.sample[i] * M::events + e] = static_cast<double>(lane(happened.next[e], i));
    }
    if (count < call.capacity) {
      const int64_t place = count * in.batch + at.sample[i];
      call.t[place] = lane(c.last_end, i);
      call.index[place] = which;
      store_lane<M>(call.y, x.y1, i, place);
    }
    return ++count >= call.most || M::ends(which);
  }

  // The state of these lanes, which are at their event, is changed.
  ODENET_HD void change(const MaskOf<P>& lanes) const {
    const P time = convert<T>(c.time);
    unrolled<M::events>([&](auto e) {
      if constexpr (M::applies(e)) {
        const MaskOf<P> here = lanes & (happened.which == P(T(e)));
        if (!any(here)) return;
        P to[kOwn<M>];
        M::template apply<e>(in, time, x.y, x.arguments, to);
        for (int n = 0; n < kOwn<M>; ++n) x.y[n] = select(here, to[n], x.y[n]);
      }
    });
    look(lanes, time);
    for (int e = 0; e < M::events; ++e) {
      set(lanes & (happened.next[e] == happened.next[e]), happened.sign[e], happened.next[e]);
    }
  }

 private:
  // The signs where these lanes are.
  ODENET_HD void look(const MaskOf<P>& lanes, const P& time) const {
    P values[M::events];
    M::event_values(in, time, x.y, x.arguments, values, values);
    for (int e = 0; e < M::events; ++e) {
      const P sign = sign_of(values[e]);
      const MaskOf<P> defined = sign == sign;
      set(lanes, happened.sign[e], select(defined, sign, P(T(0))));
      for_lanes(lanes & negate(defined), [&](int i) { happened.count[i] = -1; });
    }
  }

  // Whether a function that had this sign comes to an event where it has another.
  ODENET_HD static MaskOf<P> counts(int e, const P& before) {
    if (M::direction(e) != 0) return before == P(T(-M::direction(e)));
    return negate(before == P(T(0)));
  }

  ODENET_HD D time_at(const P& theta) const {
    const D time = c.last_time + convert<double>(theta) * c.last_dt;
    const auto over = ((time - c.last_end) * c.last_dt > D(0.0)) | (convert<double>(theta) == D(1.0));
    return select(over, c.last_end, time);
  }

  ODENET_HD void values_at(const P& theta, const D& time, const P& dt, P* y, P* values) const {
    P weights[M::stages];
    interpolant<M>(theta, dt, weights);
    for (int n = 0; n < kOwn<M>; ++n) {
      y[n] = x.y[n];
      for (int j = 0; j < M::stages; ++j) y[n] = fused(weights[j], x.k[j][n], y[n]);
    }
    M::event_values(in, convert<T>(time), y, x.arguments, values, values);
  }

  // The value of a function that had this sign, positive ahead of the event and not behind it.
  ODENET_HD static P oriented(int e, const P& before, const P& value) {
    return select(counts(e, before), before * value, P(T(INFINITY)));
  }

  // The least of these.
  ODENET_HD P least_at(const P& theta, const P& dt, const P* before) const {
    P y[kOwn<M>], values[M::events], least = P(T(INFINITY));
    values_at(theta, time_at(theta), dt, y, values);
    for (int e = 0; e < M::events; ++e) {
      const P value = oriented(e, before[e], values[e]);
      set(negate(value >= least), least, value);
    }
    return least;
  }

  // By the method of interpolation, truncation and projection: as few halvings as bisection at worst (Oliveira and
  // Takahashi 2021, doi 10.1145/3423597). low: the part of the step of each lane. before: the signs there.
  ODENET_HD void end_at_zero(const MaskOf<P>& crossed, const MaskOf<P>& undefined, P low, const P* before,
                             const P& dt) const {
    P high = low + P(T(1) / T(kParts)), slack = high - low;
    const P scale = T(0.2) / slack;
    const D size_of_time = maximum(abs(c.last_time), abs(c.last_end)) / abs(c.last_dt);
    P tolerance = convert<T>(size_of_time) * kEpsilon;
    tolerance = select(tolerance > P(kEpsilon / 2), tolerance, P(kEpsilon / 2));
    P at_low = least_at(low, dt, before), at_high = least_at(high, dt, before);
    at_low = select(at_low > P(T(0)), at_low, P(T(0)));
    at_high = select(at_high < P(T(0)), at_high, P(T(0)));
    for (int turn = 0; turn < 2 * kDigits; ++turn) {
      const P size = high - low;
      const MaskOf<P> active = crossed & (size > tolerance * T(2));
      if (!any(active)) break;
      const P middle = (low + high) * T(0.5);
      P secant = (high * at_low - low * at_high) / (at_low - at_high);
      secant = select(secant - secant == P(T(0)), secant, middle);
      const P side = select(middle >= secant, P(T(1)), P(T(-1)));
      P shift = scale * size * size;  // at least so much that more is learned than of an end
      shift = select(shift > tolerance, shift, tolerance);
      const P inner = select(shift <= abs(middle - secant), secant + side * shift, middle);
      const P room = slack - size * T(0.5);
      const P next = select(abs(inner - middle) <= room, inner, middle - side * room);
      const P value = least_at(next, dt, before);
      const MaskOf<P> ahead = value > P(T(0));
      set(active & ahead, low, next);
      set(active & ahead, at_low, value);
      set(active & negate(ahead), high, next);
      set(active & negate(ahead), at_high, value);
      slack = slack * T(0.5);
    }
    P together = tolerance * T(kTogether);
    together = select(together < P(T(1) / T(kTogether)), together, P(T(1) / T(kTogether)));
    end_at(crossed, undefined, high, together, before, dt);
  }

  // The first of the functions that has come to zero here, or does so at the same time, is the event; the others of
  // them go on with the sign that they had, and so does what has come to its own event at the start of the step just
  // now.
  ODENET_HD void end_at(const MaskOf<P>& crossed, const MaskOf<P>& undefined, const P& theta, const P& together,
                        const P* before, const P& dt) const {
    P y[kOwn<M>], values[M::events], later[M::events];
    const P after = theta + together;
    values_at(after, c.last_time + convert<double>(after) * c.last_dt, dt, y, later);
    values_at(theta, time_at(theta), dt, y, values);
    P which(T(0)), least = P(T(INFINITY)), next[M::events];
    MaskOf<P> passed(false), nothing = undefined;
    for (int e = 0; e < M::events; ++e) {
      const P value = oriented(e, before[e], values[e]);
      const MaskOf<P> hit = negate(value > P(T(0))) | (oriented(e, before[e], later[e]) <= P(T(0)));
      const MaskOf<P> just = (before[e] == P(T(0))) & (theta <= together);
      next[e] = select(hit | just, before[e], P(T(NAN)));
      set((hit | negate(value >= least)) & negate(passed), which, P(T(e)));
      set(negate(value >= least), least, value);
      passed = passed | hit;
      nothing = nothing | negate(value == value);
    }
    for (int e = 0; e < M::events; ++e) set(crossed, happened.next[e], select(which == P(T(e)), P(T(0)), next[e]));
    for_lanes(crossed & nothing, [&](int i) { happened.count[i] = -1; });
    set(crossed, happened.which, which);
    for (int n = 0; n < kOwn<M>; ++n) x.y1[n] = select(crossed, y[n], x.y1[n]);
    set(MaskOf<D>(crossed), c.last_end, time_at(theta));
  }

  static constexpr int kDigits = Layout<T>::fraction + 1;
  static constexpr T kEpsilon = T(1) / (uint64_t{1} << Layout<T>::fraction);
};

}  // namespace ODENET_LEVEL
}  // namespace odenet
