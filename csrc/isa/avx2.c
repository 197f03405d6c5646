#define ISA avx2
#define SIMD "../simd/avx2.h"
#define TILE_TOKENS 4
#define SIDE_TOKENS 1
#define FEW_TOKENS 4
#include "all.h"
