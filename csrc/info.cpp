#include "anyattention.h"
#include "pages.h"

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

int32_t anyattention_prefer_large_pages(void *pointer, int64_t bytes) {
  if (!pointer || bytes < 0) return ANYATTENTION_INVALID_ARGUMENT;
  anyattention::prefer_large_pages(pointer, bytes);
  return ANYATTENTION_OK;
}
}
