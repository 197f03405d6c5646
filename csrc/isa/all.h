/* Every kernel, compiled with the flags of the file that includes this, and the table of what was compiled. */
#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define TEXT_(s) #s
#define TEXT(s) TEXT_(s)
#define K(name) PASTE(name, ISA)
#define INLINE inline __attribute__((always_inline))
#include <float.h>
#include <math.h>

#include "../kernels.h"

#include SIMD
#ifdef AMX
#include AMX
#endif
#include "../quants/decode.h"
#include "../quants/encode.h"
#include "../quants/search.h"
#include "../quants/whole.h"
#include "../quants/write.h"
#include "../kernels/elementwise.h"
#include "../kernels/embed.h"
#include "../kernels/unpack.h"
#ifdef AMX
#include "../kernels/prompt.h"
#endif
#include "../kernels/matmul.h"
#include "../kernels/experts.h"
#include "../kernels/attend.h"
#include "../kernels/logits.h"
#include "../kernels/read.h"

#define SERVES(OP, name) [OP_##OP] = K(name)
#define NAMED(OP, name) [OP_##OP] = TEXT(K(name))
#define OPS(X)                                                                                                         \
    X(EMBED, embed), X(EMBED_ROWS, embed_rows), X(WANTED, wanted), X(RMS_NORM, rms_norm), X(ADD, add),                 \
        X(SCALE, scale), X(GELU_MUL, gelu_mul), X(ANGLES, angles), X(ROPE, rope), X(QUANTIZE, quantize),               \
        X(MATMUL, matmul), X(STORE_KV, store_kv), X(ATTEND, attend), X(ROUTE, route), X(GROUP, group),                 \
        X(EXPERTS_UP, experts_up), X(EXPERTS_GELU, experts_gelu), X(EXPERTS_DOWN, experts_down), X(SOFTCAP, softcap),  \
        X(TOP_PART, top_part), X(TOP, top)

const kernel_table K(kernels) = {
    .isa = TEXT(ISA),
    .names = {OPS(NAMED)},
    .ops = {OPS(SERVES)},
    .attend_merge = K(attend_merge),
    .read = K(read),
    .quantize = K(quantize_blocks),
#ifdef AMX
    .round = K(round_blocks),
#endif
    .encode = K(encode),
    .squared_error = K(squared_error),
    .matmul = K(matmul_rows),
    .matmul_names =
        {
            [TYPE_F32] = TEXT(K(matmul_f32)),
            [TYPE_F16] = TEXT(K(matmul_f16)),
            [TYPE_BF16] = TEXT(K(matmul_bf16)),
#define QUANT(name, NAME, values, group, bias, most, minima) [TYPE_##NAME] = TEXT(K(matmul_##name)),
#include "../quants.def"
#undef QUANT
        },
    .row_names =
        {
            [TYPE_F32] = TEXT(K(row_f32)),
            [TYPE_F16] = TEXT(K(row_f16)),
            [TYPE_BF16] = TEXT(K(row_bf16)),
#define QUANT(name, NAME, values, group, bias, most, minima) [TYPE_##NAME] = TEXT(K(row_##name)),
#include "../quants.def"
#undef QUANT
        },
    .dequantize =
        {
            [TYPE_F32] = K(row_f32),
            [TYPE_F16] = K(row_f16),
            [TYPE_BF16] = K(row_bf16),
#define QUANT(name, NAME, values, group, bias, most, minima) [TYPE_##NAME] = K(row_##name),
#include "../quants.def"
#undef QUANT
        },
};
