/* Files under us: a mapping that shrinks reads as zeros and is reported, its bytes are asked for before their first
 * use, rows of big tables are fetched by pread. */
#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kernels.h"

/* -- SIGBUS ------------------------------------------------------------------------------------- */

enum { MAPPINGS = 256 };
static struct {
    _Atomic uintptr_t begin, end;
    _Atomic int32_t poisoned;
} mappings[MAPPINGS];
static struct sigaction previous;
static atomic_flag installed = ATOMIC_FLAG_INIT;

static void on_bus_error(int number, siginfo_t *info, void *state) {
    const uintptr_t at = (uintptr_t)info->si_addr, page = (uintptr_t)sysconf(_SC_PAGESIZE);
    int ours = 0;
    for (int i = 0; i < MAPPINGS; i++)
        if (at >= atomic_load(&mappings[i].begin) && at < atomic_load(&mappings[i].end)) {
            atomic_store(&mappings[i].poisoned, 1);
            ours = 1;
        }
    void *place = (void *)(at / page * page);
    if (ours && mmap(place, page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED) return;
    if (previous.sa_flags & SA_SIGINFO && previous.sa_sigaction) {
        previous.sa_sigaction(number, info, state);
        return;
    }
    sigaction(SIGBUS, &previous, NULL); /* not ours: the fault comes again and meets whoever was here before */
}

int32_t mapping_register(uint64_t address, int64_t bytes) {
    if (!atomic_flag_test_and_set(&installed)) {
        struct sigaction action = {.sa_flags = SA_SIGINFO | SA_NODEFER};
        action.sa_sigaction = on_bus_error;
        sigemptyset(&action.sa_mask);
        sigaction(SIGBUS, &action, &previous);
    }
    for (int i = 0; i < MAPPINGS; i++) {
        uintptr_t none = 0;
        if (!atomic_compare_exchange_strong(&mappings[i].end, &none, 1)) continue;
        int32_t poisoned = 0; /* as whoever has the same file mapped already knows */
        for (int j = 0; j < MAPPINGS; j++)
            if (j != i && address >= atomic_load(&mappings[j].begin) && address < atomic_load(&mappings[j].end))
                poisoned |= atomic_load(&mappings[j].poisoned);
        atomic_store(&mappings[i].poisoned, poisoned);
        atomic_store(&mappings[i].begin, (uintptr_t)address);
        atomic_store(&mappings[i].end, (uintptr_t)address + (uintptr_t)bytes);
        return i;
    }
    return -1;
}
int32_t mapping_poisoned(int32_t slot) {
    return slot >= 0 && slot < MAPPINGS ? atomic_load(&mappings[slot].poisoned) : 0;
}
void mapping_release(int32_t slot) {
    if (slot < 0 || slot >= MAPPINGS) return;
    atomic_store(&mappings[slot].begin, UINTPTR_MAX);
    atomic_store(&mappings[slot].end, 0);
}

/* -- The disk ------------------------------------------------------------------------------------- */

enum { FETCH_BYTES = 128 << 10 }; /* Linux reads no more for one advice, where nobody told it to */

static uint64_t page_bytes(void) { return (uint64_t)sysconf(_SC_PAGESIZE); }
static void advise(uint64_t address, int64_t bytes, uint64_t piece, int advice) {
    const uint64_t end = address + (uint64_t)bytes;
    for (uint64_t at = address / page_bytes() * page_bytes(); at < end; at += piece)
        posix_madvise((void *)(uintptr_t)at, end - at < piece ? end - at : piece, advice);
}
void mapping_fetch(uint64_t address, int64_t bytes) { advise(address, bytes, FETCH_BYTES, POSIX_MADV_WILLNEED); }
void mapping_scattered(uint64_t address, int64_t bytes) {
    advise(address, bytes, (uint64_t)bytes + page_bytes(), POSIX_MADV_RANDOM);
}
/* In a virtual machine the host may have to find memory for a page, too, when it is touched. */
void mapping_touch(uint64_t address, int64_t bytes) {
    const uint64_t end = address + (uint64_t)bytes;
    for (uint64_t at = address; at < end; at += page_bytes()) (void)*(const volatile uint8_t *)(uintptr_t)at;
}

/* -- Row cache: the least recently used row makes room ------------------------------------------------ */

struct row_cache {
    int32_t fd, rows, slots;
    int64_t offset, row_bytes, clock;
    int32_t *slot_of; /* [rows], -1: not here */
    int32_t *row_of;  /* [slots] */
    int64_t *used;    /* [slots]: when it was last asked for */
    uint8_t *data;    /* [slots][row_bytes] */
};

row_cache *row_cache_new(int32_t fd, int64_t offset, int64_t row_bytes, int32_t rows, int32_t slots) {
    row_cache *r = calloc(1, sizeof *r);
    if (!r) return NULL;
    *r = (row_cache){.fd = fd, .rows = rows, .slots = slots, .offset = offset, .row_bytes = row_bytes};
    r->slot_of = malloc((size_t)rows * sizeof(int32_t));
    r->row_of = malloc((size_t)slots * sizeof(int32_t));
    r->used = calloc((size_t)slots, sizeof(int64_t));
    r->data = malloc((size_t)slots * (size_t)row_bytes);
    if (!r->slot_of || !r->row_of || !r->used || !r->data) {
        row_cache_free(r);
        return NULL;
    }
    memset(r->slot_of, -1, (size_t)rows * sizeof(int32_t));
    memset(r->row_of, -1, (size_t)slots * sizeof(int32_t));
    memset(r->data, 0, (size_t)slots * (size_t)row_bytes);
    return r;
}
void row_cache_free(row_cache *r) {
    if (!r) return;
    free(r->slot_of);
    free(r->row_of);
    free(r->used);
    free(r->data);
    free(r);
}

int32_t row_cache_fetch(row_cache *r, int32_t row) {
    if (row < 0 || row >= r->rows) return 0;
    int32_t slot = r->slot_of[row];
    if (slot < 0) {
        slot = 0;
        for (int32_t i = 1; i < r->slots; i++)
            if (r->used[i] < r->used[slot]) slot = i;
        if (r->row_of[slot] >= 0) r->slot_of[r->row_of[slot]] = -1;
        r->row_of[slot] = -1;
        uint8_t *at = r->data + slot * r->row_bytes;
        for (int64_t done = 0; done < r->row_bytes;) {
            const ssize_t n =
                pread(r->fd, at + done, (size_t)(r->row_bytes - done), r->offset + row * r->row_bytes + done);
            if (n < 0 && errno == EINTR) continue;
            if (n <= 0) return 0;
            done += n;
        }
        r->row_of[slot] = row;
        r->slot_of[row] = slot;
    }
    r->used[slot] = ++r->clock;
    return 1;
}
const uint8_t *row_cache_row(const row_cache *r, int32_t row) { return r->data + r->slot_of[row] * r->row_bytes; }
