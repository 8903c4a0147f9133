// How many threads a piece of work is worth.
//
// A team ends with the last of its threads. On a busy machine that one may be scheduled out, and the others wait for
// milliseconds: far longer than small work takes. So work below a grain runs on the caller's thread. Work above it gets
// all threads, not as many as it has grains: libgomp ends the threads that a smaller team leaves out, and the next
// operator of PyTorch starts them anew. Nothing but the time depends on any of this.
#ifndef ANYATTENTION_TEAM_H
#define ANYATTENTION_TEAM_H

#include <algorithm>
#include <cstdint>
#include <cstdlib>

namespace anyattention {

// Nanoseconds of one thread; see "Small work" in DESIGN.md for what was measured.
constexpr double kGrain = 200e3;

// ANYATTENTION_GRAIN takes its place: 0 in tests, where small work must run on many threads.
inline double grain() {
  static const double nanoseconds = [] {
    const char *given = std::getenv("ANYATTENTION_GRAIN");
    return given ? std::atof(given) : kGrain;
  }();
  return nanoseconds;
}

// The size of the team for work that takes one thread about so many nanoseconds and is cut into pieces. A caller starts
// that team: every size comes from here, so that none escapes the grain.
inline int team_size(int64_t threads, int64_t pieces, double nanoseconds) {
  if (nanoseconds < grain() || threads < 2 || pieces < 2) return 1;
  return static_cast<int>(std::min(threads, pieces));
}

}  // namespace anyattention

#endif
