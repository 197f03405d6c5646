#define ISA amx
#define SIMD "../simd/avx512.h"
#define AMX "../simd/amx.h"
#define TILE_TOKENS 12
#define SIDE_TOKENS 4
#define FEW_TOKENS 8
#include "all.h"
