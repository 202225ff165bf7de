// The processor's intrinsics, where it has some.
#pragma once

#if defined(__SSE2__)
#pragma GCC diagnostic push
// GCC 12 warns of its own header (bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
