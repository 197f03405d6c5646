#define ISA scalar
#define SIMD "../simd/scalar.h"
#define TILE_TOKENS 4
#define SIDE_TOKENS 1
#define FEW_TOKENS 1
#include "all.h"
