#define ISA neon
#define SIMD "../simd/neon.h"
#define TILE_TOKENS 4
#define SIDE_TOKENS 4
#define FEW_TOKENS 2
#include "all.h"
