#define ISA neon_i8mm
#define SIMD "../simd/neon.h"
#define TILE_TOKENS 4
#define SIDE_TOKENS 2
#define FEW_TOKENS 2
#include "all.h"
