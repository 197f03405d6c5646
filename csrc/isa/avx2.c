#define ISA avx2
#define SIMD "../simd/avx2.h"
#define TILE_TOKENS 4
#include "all.h"
