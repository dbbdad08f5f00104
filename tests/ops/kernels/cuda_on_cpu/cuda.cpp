// How the threads of cuda.h run: as fibers, or as real threads (-DREAL_THREADS).
#include "cuda.h"

#ifdef REAL_THREADS
#include <condition_variable>
#include <mutex>
#include <thread>
#else
#include <ucontext.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define BEFORE_SWITCH(save, bottom, size) __sanitizer_start_switch_fiber(save, bottom, size)
#define AFTER_SWITCH(fake, bottom, size) __sanitizer_finish_switch_fiber(fake, bottom, size)
#else
#define BEFORE_SWITCH(save, bottom, size) ((void)0)
#define AFTER_SWITCH(fake, bottom, size) ((void)0)
#endif
#endif

namespace cuda_on_cpu {
namespace {

int num_block_threads = 0;
Meeting block;
Meeting warps[MAX_THREADS / WARP];
uint64_t exchanged[2][MAX_THREADS];
int counted[2];
uint64_t num_counts[MAX_THREADS];

[[noreturn]] void diverged(const char* what, const char* where) {
    std::fprintf(stderr, "divergence: %s %s\n", what, where);
    std::abort();
}

void prepare(int num_threads) {
    if (num_threads % WARP != 0 || num_threads < 1 || num_threads > MAX_THREADS) diverged("bad", "block size");
    num_block_threads = num_threads;
    block.expect(num_threads);
    for (Meeting& warp : warps) warp.expect(WARP);
    counted[0] = counted[1] = 0;
    std::fill_n(num_counts, MAX_THREADS, 0);
}

#ifdef REAL_THREADS

thread_local Thread* current;
std::mutex mutex;
std::condition_variable changed;

#else

struct Fiber {
    Thread thread;
    ucontext_t context;
    char* stack = nullptr;
    void* fake_stack = nullptr;
    Meeting* waits_for = nullptr;
    uint64_t until = 0;
    bool done = false;
};
constexpr size_t STACK_BYTES = 64 << 10;
Fiber fibers[MAX_THREADS];
Fiber* current;
ucontext_t scheduler;
void* scheduler_fake_stack = nullptr;
[[maybe_unused]] const void* scheduler_bottom = nullptr;
[[maybe_unused]] size_t scheduler_size = 0;
const std::function<void()>* body;

void run_fiber() {
    AFTER_SWITCH(nullptr, &scheduler_bottom, &scheduler_size);
    (*body)();
    current->done = true;
    BEFORE_SWITCH(nullptr, scheduler_bottom, scheduler_size);
    swapcontext(&current->context, &scheduler);
}

void give_way() {
    Fiber* me = current;
    BEFORE_SWITCH(&me->fake_stack, scheduler_bottom, scheduler_size);
    swapcontext(&me->context, &scheduler);
    AFTER_SWITCH(me->fake_stack, &scheduler_bottom, &scheduler_size);
}

#endif

}  // namespace

Index block_index{}, grid_size{1, 1};
Index block_size() { return {static_cast<unsigned>(num_block_threads), 1}; }
Meeting& block_meeting() { return block; }
Meeting& warp_meeting() { return warps[self().index.x / WARP]; }

const uint64_t* exchange(uint64_t value, const char* kind) {
    Thread& me = self();
    uint64_t* buffer = exchanged[me.num_exchanges++ % 2];
    buffer[me.index.x] = value;
    warp_meeting().wait(kind);
    return buffer + me.index.x / WARP * WARP;
}

int block_count(bool predicate) {
    const int turn = num_counts[self().index.x]++ % 2;
    if (predicate) __atomic_fetch_add(&counted[turn], 1, __ATOMIC_RELAXED);
    block.wait("__syncthreads_count");
    const int result = __atomic_load_n(&counted[turn], __ATOMIC_RELAXED);
    block.wait("__syncthreads_count, read");
    if (self().index.x == 0) __atomic_store_n(&counted[turn], 0, __ATOMIC_RELAXED);
    return result;
}

#ifdef REAL_THREADS

Thread& self() { return *current; }

void Meeting::wait(const char* kind) {
    std::unique_lock lock(mutex);
    if (arrived_ == 0) kind_ = kind;
    if (std::strcmp(kind_, kind) != 0) diverged(kind_, kind);
    const uint64_t mine = generation_;
    if (++arrived_ == expected_) {
        arrived_ = 0;
        ++generation_;
        changed.notify_all();
    } else {
        changed.wait(lock, [&] { return generation_ != mine; });
    }
}

void launch(int num_threads, unsigned, const std::function<void()>& kernel) {
    prepare(num_threads);
    std::vector<std::thread> threads;
    for (int i = 0; i < num_threads; ++i) {
        threads.emplace_back([i, &kernel] {
            Thread thread{{static_cast<unsigned>(i), 0}};
            current = &thread;
            kernel();
        });
    }
    for (std::thread& thread : threads) thread.join();
}

#else

Thread& self() { return current->thread; }

void Meeting::wait(const char* kind) {
    if (arrived_ == 0) kind_ = kind;
    if (std::strcmp(kind_, kind) != 0) diverged(kind_, kind);
    if (++arrived_ == expected_) {
        arrived_ = 0;
        ++generation_;
        return;
    }
    current->waits_for = this;
    current->until = generation_ + 1;
    give_way();
}

void launch(int num_threads, unsigned seed, const std::function<void()>& kernel) {
    prepare(num_threads);
    body = &kernel;
    std::vector<int> order(num_threads);
    for (int i = 0; i < num_threads; ++i) {
        Fiber& fiber = fibers[i];
        order[i] = i;
        if (fiber.stack == nullptr) fiber.stack = static_cast<char*>(std::malloc(STACK_BYTES));
        fiber.thread = Thread{{static_cast<unsigned>(i), 0}};
        fiber.done = false;
        fiber.waits_for = nullptr;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack;
        fiber.context.uc_stack.ss_size = STACK_BYTES;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run_fiber, 0);
    }
    uint64_t state = seed * 2654435761u + 1;
    for (int left = num_threads; left > 0;) {
        for (int i = num_threads - 1; i > 0; --i) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            std::swap(order[i], order[(state >> 33) % (i + 1)]);
        }
        bool progress = false;
        for (int i : order) {
            Fiber& fiber = fibers[i];
            if (fiber.done || (fiber.waits_for != nullptr && fiber.waits_for->generation_ < fiber.until)) continue;
            fiber.waits_for = nullptr;
            current = &fiber;
            BEFORE_SWITCH(&scheduler_fake_stack, fiber.stack, STACK_BYTES);
            swapcontext(&scheduler, &fiber.context);
            AFTER_SWITCH(scheduler_fake_stack, nullptr, nullptr);
            progress = true;
            left -= fiber.done;
        }
        if (!progress) {
            for (int i : order) {
                if (!fibers[i].done) diverged("threads wait forever at", fibers[i].waits_for->kind_);
            }
        }
    }
}

#endif

}  // namespace cuda_on_cpu
