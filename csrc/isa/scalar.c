#define ISA scalar
#define SIMD "../simd/scalar.h"
#define TILE_TOKENS 4
#include "all.h"
