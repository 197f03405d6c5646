#define ISA neon
#define SIMD "../simd/neon.h"
#define TILE_TOKENS 4
#define SIDE_TOKENS 4
#include "all.h"
