/* Threads that spin for a moment, then sleep. One job at a time; whoever calls is thread 0. */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "kernels.h"

enum { SPINS = 20000 }; /* about 50 us */

struct pool {
    int32_t threads;
    _Atomic uint32_t turn, finished, arrived, phase;
    _Atomic int32_t sleepers, quit;
    job work;
    void *arg;
    pthread_mutex_t busy, lock;
    pthread_cond_t wake;
    pthread_t ids[];
};
typedef struct {
    pool *p;
    int32_t thread;
} start;

static inline void pause_once(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}
/* Waits until *word is no longer `old`; a preempted partner is given the CPU. */
static void await_change(_Atomic uint32_t *word, uint32_t old) {
    for (int n = 0; atomic_load_explicit(word, memory_order_acquire) == old; n++) {
        if (n < SPINS) pause_once();
        else sched_yield();
    }
}
static void await_turn(pool *p, uint32_t seen) {
    for (int n = 0; n < SPINS; n++) {
        if (atomic_load_explicit(&p->turn, memory_order_acquire) != seen) return;
        pause_once();
    }
    pthread_mutex_lock(&p->lock);
    atomic_fetch_add(&p->sleepers, 1);
    while (atomic_load(&p->turn) == seen) pthread_cond_wait(&p->wake, &p->lock);
    atomic_fetch_sub(&p->sleepers, 1);
    pthread_mutex_unlock(&p->lock);
}
static void *worker(void *arg) {
    const start s = *(start *)arg;
    free(arg);
    for (uint32_t seen = 0;; seen++) {
        await_turn(s.p, seen);
        if (atomic_load(&s.p->quit)) return NULL;
        s.p->work(s.p->arg, s.thread, s.p->threads);
        atomic_fetch_add_explicit(&s.p->finished, 1, memory_order_release);
    }
}
static void next_turn(pool *p) {
    pthread_mutex_lock(&p->lock);
    atomic_fetch_add(&p->turn, 1);
    if (atomic_load(&p->sleepers)) pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
}

pool *pool_new(int32_t threads) {
    if (threads < 1 || threads > 1024) return NULL;
    pool *p = calloc(1, sizeof *p + (size_t)threads * sizeof(pthread_t));
    if (!p) return NULL;
    pthread_mutex_init(&p->busy, NULL);
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->wake, NULL);
    for (p->threads = 1; p->threads < threads; p->threads++) {
        start *s = malloc(sizeof *s);
        if (s) *s = (start){p, p->threads};
        if (!s || pthread_create(&p->ids[p->threads], NULL, worker, s)) {
            free(s);
            pool_free(p);
            return NULL;
        }
    }
    return p;
}
void pool_free(pool *p) {
    if (!p) return;
    atomic_store(&p->quit, 1);
    next_turn(p);
    for (int32_t i = 1; i < p->threads; i++) pthread_join(p->ids[i], NULL);
    pthread_mutex_destroy(&p->busy);
    pthread_mutex_destroy(&p->lock);
    pthread_cond_destroy(&p->wake);
    free(p);
}
int32_t pool_threads(const pool *p) { return p->threads; }

void pool_run(pool *p, job work, void *arg) {
    pthread_mutex_lock(&p->busy);
    p->work = work;
    p->arg = arg;
    atomic_store(&p->finished, 0);
    if (p->threads > 1) next_turn(p);
    work(arg, 0, p->threads);
    for (uint32_t done; (done = atomic_load_explicit(&p->finished, memory_order_acquire)) < (uint32_t)p->threads - 1;)
        await_change(&p->finished, done);
    pthread_mutex_unlock(&p->busy);
}
/* Who comes early fetches what it will read next: `bytes` from `ahead` on. */
void pool_barrier(pool *p, const uint8_t *ahead, int64_t bytes) {
    if (p->threads == 1) return;
    const uint32_t phase = atomic_load_explicit(&p->phase, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&p->arrived, 1, memory_order_acq_rel) == (uint32_t)p->threads - 1) {
        atomic_store_explicit(&p->arrived, 0, memory_order_relaxed);
        atomic_fetch_add_explicit(&p->phase, 1, memory_order_release);
    } else {
        for (int64_t n = 0; n < bytes && atomic_load_explicit(&p->phase, memory_order_acquire) == phase; n += 64)
            __builtin_prefetch(ahead + n, 0, 2);
        await_change(&p->phase, phase);
    }
}
