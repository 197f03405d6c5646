#define ISA avx512
#define SIMD "../simd/avx512.h"
#define TILE_TOKENS 12
#include "all.h"
