/* Which instruction sets were compiled, which this CPU has, and their tables: best first. */
#ifdef HAVE_amx
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

extern const kernel_table kernels_scalar;
static int32_t always(void) { return 1; }

#ifdef HAVE_avx2
extern const kernel_table kernels_avx2;
static int32_t has_avx2(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif
#ifdef HAVE_avx512
extern const kernel_table kernels_avx512;
static int32_t has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
}
#endif
#ifdef HAVE_amx
extern const kernel_table kernels_amx;
int32_t amx_sound_amx(void);
#ifdef AMX_EMULATED
static int32_t amx_granted(void) { return 1; }
#else
/* The CPU has AMX-BF16 and AMX-TILE, and Linux, when asked, lets this process use tiles (ARCH_REQ_XCOMP_PERM). */
static int32_t amx_granted(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 22 & 1 && d >> 24 & 1 &&
           !syscall(SYS_arch_prctl, 0x1023, 18);
}
#endif
static int32_t has_amx(void) {
    static _Atomic int32_t known; /* 1: no, 2: yes */
    if (!known) known = 1 + (has_avx512() && __builtin_cpu_supports("avx512bf16") && amx_granted() && amx_sound_amx());
    return known - 1;
}
#endif

#ifdef HAVE_neon
extern const kernel_table kernels_neon;
#ifdef __APPLE__
#include <sys/sysctl.h>
static int32_t feature(const char *name) {
    int here = 0;
    size_t bytes = sizeof here;
    return !sysctlbyname(name, &here, &bytes, NULL, 0) && here;
}
static int32_t has_neon(void) { return feature("hw.optional.arm.FEAT_DotProd"); }
#else
#include <sys/auxv.h>
enum { ASIMDDP = 1 << 20, I8MM = 1 << 13 }; /* Linux's asm/hwcap.h, which may be older than the compiler */
static int32_t has_neon(void) { return (getauxval(AT_HWCAP) & ASIMDDP) != 0; }
#endif
#endif
#ifdef HAVE_neon_i8mm
extern const kernel_table kernels_neon_i8mm;
#ifdef __APPLE__
static int32_t has_neon_i8mm(void) { return has_neon() && feature("hw.optional.arm.FEAT_I8MM"); }
#else
static int32_t has_neon_i8mm(void) { return has_neon() && getauxval(AT_HWCAP2) & I8MM; }
#endif
#endif

static const struct {
    const kernel_table *table;
    int32_t (*here)(void);
} levels[] = {
#ifdef HAVE_amx
    {&kernels_amx, has_amx},
#endif
#ifdef HAVE_avx512
    {&kernels_avx512, has_avx512},
#endif
#ifdef HAVE_avx2
    {&kernels_avx2, has_avx2},
#endif
#ifdef HAVE_neon_i8mm
    {&kernels_neon_i8mm, has_neon_i8mm},
#endif
#ifdef HAVE_neon
    {&kernels_neon, has_neon},
#endif
    {&kernels_scalar, always},
};

int32_t isa_count(void) { return sizeof levels / sizeof *levels; }
const char *isa_name(int32_t isa) { return isa >= 0 && isa < isa_count() ? levels[isa].table->isa : NULL; }
int32_t isa_available(int32_t isa) { return isa >= 0 && isa < isa_count() && levels[isa].here(); }
const kernel_table *kernels_of(int32_t isa) { return isa_available(isa) ? levels[isa].table : NULL; }

const char *kernel_name(int32_t isa, int32_t code, int32_t type) {
    if (!isa_name(isa) || code < 0 || code >= OP_COUNT) return NULL;
    const kernel_table *t = levels[isa].table;
    if (type < 0 || type >= TYPE_COUNT) return t->names[code];
    const int by_type = code == OP_MATMUL || code == OP_EXPERTS_UP || code == OP_EXPERTS_DOWN;
    return by_type                                     ? t->matmul_names[type]
           : code == OP_EMBED || code == OP_EMBED_ROWS ? t->row_names[type]
                                                       : t->names[code];
}
