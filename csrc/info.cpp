#include "anyattention.h"

extern "C" {

int32_t anyattention_interface(void) { return ANYATTENTION_INTERFACE; }

const char *anyattention_version(void) { return ANYATTENTION_VERSION; }

const char *anyattention_level(void) { return ANYATTENTION_LEVEL; }

int32_t anyattention_threaded(void) {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}
}
