/* Threads that share the items of one phase after another. Whoever is free takes the next item, so a thread that the
 * system has put aside holds up nothing but the item in its hands. Waiting spins for some microseconds, in which the
 * next phase usually comes, and then sleeps: an idle core fetches a thread that waits for a busy one.
 */

#ifndef CASTOR_POOL_H
#define CASTOR_POOL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

#define SPINS 4000
#define MAX_THREADS 64
#define ITEM_BITS 22
#define MAX_ITEMS ((1 << ITEM_BITS) - 1)

typedef void (*Item)(void *argument, int index, int thread);

typedef struct {
    /* The phase's number, how many items it has, and which is next: an item is taken by one exchange, which fails for a
     * thread that still looks at an earlier phase. */
    _Atomic uint64_t state;
    _Atomic int done, sleeping, main_sleeps, closing;
    Item _Atomic run;
    void *_Atomic argument;
    int threads;
    pthread_mutex_t lock;
    pthread_cond_t work, finished;
    pthread_t handles[MAX_THREADS];
} Pool;

typedef struct {
    Pool *pool;
    int number;
} Worker;

static inline void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Take and run items of the phase that is current until none is left. */
static void work_off(Pool *pool, int thread) {
    for (;;) {
        uint64_t seen = atomic_load(&pool->state);
        Item run = atomic_load(&pool->run);
        void *argument = atomic_load(&pool->argument);
        int index = (int)(seen & MAX_ITEMS), items = (int)(seen >> ITEM_BITS & MAX_ITEMS);
        if (index >= items) return;
        if (!atomic_compare_exchange_strong(&pool->state, &seen, seen + 1)) continue;
        run(argument, index, thread);
        if (atomic_fetch_add(&pool->done, 1) + 1 == items && atomic_load(&pool->main_sleeps)) {
            pthread_mutex_lock(&pool->lock);
            pthread_cond_signal(&pool->finished);
            pthread_mutex_unlock(&pool->lock);
        }
    }
}

static uint64_t phase_of(Pool *pool) { return atomic_load(&pool->state) >> 2 * ITEM_BITS; }

static void *live(void *argument) {
    Worker *worker = argument;
    Pool *pool = worker->pool;
    int thread = worker->number;
    uint64_t seen = 0;
    free(worker);
    while (!atomic_load(&pool->closing)) {
        for (int spin = 0; phase_of(pool) == seen && spin < SPINS; spin++) pause_briefly();
        if (phase_of(pool) == seen) {
            pthread_mutex_lock(&pool->lock);
            atomic_fetch_add(&pool->sleeping, 1);
            while (phase_of(pool) == seen && !atomic_load(&pool->closing)) pthread_cond_wait(&pool->work, &pool->lock);
            atomic_fetch_sub(&pool->sleeping, 1);
            pthread_mutex_unlock(&pool->lock);
        }
        seen = phase_of(pool);
        work_off(pool, thread);
    }
    return NULL;
}

static void wait_for_all(Pool *pool, int items) {
    for (int spin = 0; atomic_load(&pool->done) < items && spin < SPINS; spin++) pause_briefly();
    if (atomic_load(&pool->done) >= items) return;
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->main_sleeps, 1);
    while (atomic_load(&pool->done) < items) pthread_cond_wait(&pool->finished, &pool->lock);
    atomic_store(&pool->main_sleeps, 0);
    pthread_mutex_unlock(&pool->lock);
}

/* Run items 0 to items - 1 (at most MAX_ITEMS of them) on all threads; returns when the last one is done. */
static void run_phase(Pool *pool, Item run, void *argument, int items) {
    if (pool->threads == 1 || items == 1) {
        for (int index = 0; index < items; index++) run(argument, index, 0);
        return;
    }
    atomic_store(&pool->done, 0);
    atomic_store(&pool->run, run);
    atomic_store(&pool->argument, argument);
    atomic_store(&pool->state, (phase_of(pool) + 1) << 2 * ITEM_BITS | (uint64_t)items << ITEM_BITS);
    if (atomic_load(&pool->sleeping)) {
        pthread_mutex_lock(&pool->lock);
        pthread_cond_broadcast(&pool->work);
        pthread_mutex_unlock(&pool->lock);
    }
    work_off(pool, 0);
    wait_for_all(pool, items);
}

/* Returns 0, or -1 where not all threads can be had; `threads` then counts those that run. */
static int start_threads(Pool *pool) {
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->finished, NULL);
    for (int number = 1; number < pool->threads; number++) {
        Worker *worker = malloc(sizeof *worker);
        if (worker != NULL) *worker = (Worker){pool, number};
        if (worker == NULL || pthread_create(&pool->handles[number], NULL, live, worker) != 0) {
            free(worker);
            pool->threads = number;
            return -1;
        }
    }
    return 0;
}

static void stop_threads(Pool *pool) {
    pthread_mutex_lock(&pool->lock);
    atomic_store(&pool->closing, 1);
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    for (int number = 1; number < pool->threads; number++) pthread_join(pool->handles[number], NULL);
}

#endif
