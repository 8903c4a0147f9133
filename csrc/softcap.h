// The soft cap of a score, c tanh(x / c), for any c > 0: also where c, c * c or x / c leaves T.
#ifndef ANYATTENTION_SOFTCAP_H
#define ANYATTENTION_SOFTCAP_H

#include <algorithm>
#include <cmath>
#include <limits>

namespace anyattention {

// A call's softcap as the nearest normal number of T; 0 stays 0, no cap.
template <class T>
inline T cap_of(double softcap) {
  if (softcap == 0) return 0;
  const double least = std::numeric_limits<T>::min(), most = std::numeric_limits<T>::max();
  return static_cast<T>(std::min(std::max(softcap, least), most));
}

// Where (x / c)^2 is below this, c tanh(x / c) is x to half a digit, and x / c may have lost its digits.
template <class T>
constexpr T kLinear = std::numeric_limits<T>::epsilon();

// c tanh(x / c), and its derivative.
template <class T>
inline T capped(T x, T cap, T &slope) {
  const T t = std::tanh(x / cap);
  slope = 1 - t * t;
  return t * t < kLinear<T> ? x : cap * t;
}

}  // namespace anyattention

#endif
