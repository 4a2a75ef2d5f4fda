// Runs CUDA kernels on a processor. A thread of a kernel is a fiber: a stack of its own, left at barriers for that of
// another. One at a time runs, in the thread that called, so nothing here needs to be atomic, and nothing is by chance
// but what the caller's `order` draws.

// The checked longjmp refuses to go from one stack to another.
#undef _FORTIFY_SOURCE

#include "emulator.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>

#include "support.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define AFFECT_ASAN 1
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define AFFECT_ASAN 1
#endif
#if defined(AFFECT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace affect::host {

char *shared_memory;

namespace {

constexpr unsigned kLanes = 32, kMostThreads = 1024, kMostShared = 232448;
// Threads that may be alive at once. Each stack is two mappings, of which Linux allows a process 65530.
constexpr size_t kMostFibers = 16384;
// Far more than anybody waits for.
constexpr uint64_t kMostBlocks = 1 << 24;
#if defined(AFFECT_ASAN)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif
// How often all threads that are left may call affect_pause in turn and nothing else happens, before it counts as a
// deadlock.
constexpr unsigned kMostTurns = 4096;

enum class State : uint8_t { ready, at_block, at_warp, paused, returned };

struct Warp {
    unsigned arrived;
    WarpOperation operation;
    // The values of this operation and of the one before, which slower lanes have yet to read.
    unsigned turn;
    uint32_t values[2][kLanes];
};

struct Block {
    uint3 index;
    unsigned live, arrived;
    char *shared;
};

struct Fiber {
    jmp_buf context;
    char *stack;
    bool started;
    State state;
    unsigned thread;
    Block *block;
    Warp *warp;
#if defined(AFFECT_ASAN)
    const void *bottom;
    size_t size;
    void *fake;
#endif
};

// What runs, and who may run next.
struct Launch {
    const Kernel *kernel;
    const void *parameters;
    bool shuffled, ahead, drawn;
    uint64_t random;
    size_t live;
    unsigned fruitless;
    bool progress;
    // A ring of all threads that may run; its size is a power of two.
    Array<Fiber *> ready;
    size_t head, count;
    // Those that called affect_pause, to be asked again when nobody else is left.
    Array<Fiber *> paused;
    size_t paused_count;
    char *error;
    size_t error_size;
    bool failed;
};

const Kernel *kernels;
// One launch at a time, and what follows belongs to it.
pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
Launch launch;
Fiber *fibers[kMostFibers];
size_t fibers_made;
// The thread that called, as what fibers return to.
Fiber caller;
Fiber *running = &caller;
#if defined(AFFECT_ASAN)
Fiber *left;
#endif

[[gnu::format(printf, 1, 2)]] void fail(const char *format, ...) noexcept {
    launch.failed = true;
    if (launch.error != nullptr && launch.error_size != 0) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(launch.error, launch.error_size, format, arguments);
        va_end(arguments);
    }
}

uint64_t draw() noexcept {
    // splitmix64
    uint64_t z = launch.random += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

// In pieces of `unit`, each of which stays in order.
template <class T>
void shuffle(T *all, size_t count, size_t unit) noexcept {
    for (size_t i = count / unit; i > 1; --i) {
        T *const other = all + draw() % i * unit;
        std::swap_ranges(other, other + unit, all + (i - 1) * unit);
    }
}

// Lets fibers run. Where order is drawn, that is for a while after all others and for a while before them: a warp, or a
// block, then runs far ahead of the rest, as one on a GPU may. For the same reason warps now and then stay together.
void make_ready(Fiber **all, size_t count) noexcept {
    const size_t mask = launch.ready.size() - 1;
    size_t at = launch.head + launch.count;
    if (launch.shuffled) {
        const uint64_t chance = draw();
        shuffle(all, count, chance % 2 == 0 ? 1 : kLanes);
        if (chance / 2 % 8 == 0) {
            launch.ahead = !launch.ahead;
        }
        if (launch.ahead) {
            launch.head -= count;
            at = launch.head;
        }
    }
    launch.count += count;
    for (size_t i = 0; i < count; ++i) {
        all[i]->state = State::ready;
        launch.ready[(at + i) & mask] = all[i];
    }
}

void release(Fiber *const *first, size_t count, State state) noexcept {
    Fiber *waiting[kMostThreads];
    size_t found = 0;
    for (size_t i = 0; i < count; ++i) {
        if (first[i]->state == state) {
            waiting[found++] = first[i];
        }
    }
    launch.progress = true;
    make_ready(waiting, found);
}

// The fibers of a block lie in the order of its threads.
Fiber *const *of_block(const Block &block) noexcept;

// Says who waits for what, in the block where it tells most.
void describe_stop() noexcept;

// Whoever runs next: a fiber, or the caller where none is left, or none can go on.
Fiber *pick() noexcept {
    if (launch.count == 0) {
        launch.fruitless = launch.progress ? 0 : launch.fruitless + 1;
        launch.progress = false;
        if (launch.paused_count == 0 || launch.fruitless > kMostTurns) {
            if (launch.live != 0) {
                describe_stop();
            }
            return &caller;
        }
        make_ready(launch.paused.data(), launch.paused_count);
        launch.paused_count = 0;
    }
    const size_t mask = launch.ready.size() - 1;
    if (launch.drawn) {
        // Any of them: one thread can then fall behind all others.
        std::swap(launch.ready[launch.head & mask], launch.ready[(launch.head + draw() % launch.count) & mask]);
    }
    Fiber *const next = launch.ready[launch.head++ & mask];
    --launch.count;
    return next;
}

[[noreturn]] void run_fiber() noexcept;

// Begins on an empty stack. Never returns, so what the sanitizer notes of this frame would stay.
[[noreturn, gnu::noinline, gnu::no_sanitize_address]] void start(const Fiber &fiber) noexcept {
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack;
    // Not all on the same lines of a cache, as multiples of a page would be.
    context.uc_stack.ss_size = kStackBytes - fiber.thread % 64 * 64;
    context.uc_link = nullptr;
    makecontext(&context, run_fiber, 0);
    setcontext(&context);
    abort();
}

[[gnu::noinline]] void switch_to(Fiber *fiber) noexcept {
    Fiber *const from = running;
    running = fiber;
    if (fiber != &caller) {
        threadIdx.x = fiber->thread;
        blockIdx = fiber->block->index;
        shared_memory = fiber->block->shared;
    }
#if defined(AFFECT_ASAN)
    left = from;
    __sanitizer_start_switch_fiber(&from->fake, fiber->bottom, fiber->size);
#endif
    // setjmp and longjmp without signal masks: swapcontext asks the system to set them, each time.
    if (_setjmp(from->context) == 0) {
        if (fiber->started) {
            _longjmp(fiber->context, 1);
        }
        fiber->started = true;
        start(*fiber);
    }
#if defined(AFFECT_ASAN)
    __sanitizer_finish_switch_fiber(from->fake, &left->bottom, &left->size);
#endif
}

void go_on() noexcept {
    Fiber *const next = pick();
    if (next != running) {
        switch_to(next);
    }
}

void leave_block() noexcept {
    Block &block = *running->block;
    running->state = State::returned;
    launch.progress = true;
    --launch.live;
    --block.live;
    if (block.live != 0 && block.arrived == block.live) {
        block.arrived = 0;
        release(of_block(block), blockDim.x, State::at_block);
    }
}

void run_fiber() noexcept {
#if defined(AFFECT_ASAN)
    __sanitizer_finish_switch_fiber(nullptr, &left->bottom, &left->size);
#endif
    for (;;) {
        launch.kernel->run(launch.parameters);
        leave_block();
        // Comes back for the next kernel.
        go_on();
    }
}

// Makes fibers up to `count`; false where there is not enough memory.
bool make_fibers(size_t count) noexcept {
    const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    for (; fibers_made < count; ++fibers_made) {
        Fiber *const fiber = create<Fiber>();
        if (fiber == nullptr) {
            return false;
        }
        void *const memory = mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
        // A stack grows down: what overflows it hits the guard.
        if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) {
            if (memory != MAP_FAILED) {
                munmap(memory, guard + kStackBytes);
            }
            destroy(fiber);
            return false;
        }
        fiber->stack = static_cast<char *>(memory) + guard;
#if defined(AFFECT_ASAN)
        fiber->bottom = fiber->stack;
        fiber->size = kStackBytes;
#endif
        fibers[fibers_made] = fiber;
    }
    return true;
}

// Forgets where fibers were that will not go on.
void abandon(size_t count) noexcept {
    for (size_t i = 0; i < count; ++i) {
        if (fibers[i]->state != State::returned) {
            fibers[i]->started = false;
#if defined(AFFECT_ASAN)
            __asan_unpoison_memory_region(fibers[i]->stack, kStackBytes);
#endif
        }
    }
}

// The blocks that are alive at once, and what they share.
struct Group {
    Array<Block> blocks;
    Array<Warp> warps;

    ~Group() {
        for (Block &block : blocks) {
            free(block.shared);
        }
    }
};
Group *group;

Fiber *const *of_block(const Block &block) noexcept {
    return fibers + static_cast<size_t>(&block - group->blocks.data()) * blockDim.x;
}

void describe_stop() noexcept {
    constexpr size_t kStates = 5;
    unsigned told[kStates] = {};
    uint3 where = {0, 0, 0};
    bool found = false, divergent = false;
    for (const Block &block : group->blocks) {
        unsigned counts[kStates] = {};
        for (unsigned i = 0; i < blockDim.x; ++i) {
            ++counts[static_cast<size_t>(of_block(block)[i]->state)];
        }
        const bool at_warp = counts[static_cast<size_t>(State::at_warp)] != 0;
        if (block.live != 0 && (!found || (at_warp && !divergent))) {
            std::memcpy(told, counts, sizeof(told));
            where = block.index;
            found = true;
            divergent = at_warp;
        }
    }
    fail(
        "%s in %s: of the %u threads of block (%u, %u, %u), %u wait at __syncthreads, %u at a warp operation and %u in "
        "affect_pause, and %u have returned; let all threads come to the same barriers",
        divergent ? "divergent barrier" : "deadlock", launch.kernel->name, blockDim.x, where.x, where.y, where.z,
        told[static_cast<size_t>(State::at_block)], told[static_cast<size_t>(State::at_warp)],
        told[static_cast<size_t>(State::paused)], told[static_cast<size_t>(State::returned)]);
}

// Runs the blocks whose numbers are given, all at once.
void run_blocks(const uint64_t *numbers, size_t count, unsigned shared_bytes) noexcept {
    const size_t threads = count * blockDim.x;
    for (size_t b = 0; b < count; ++b) {
        Block &block = group->blocks[b];
        const uint64_t n = numbers[b];
        block.index = {static_cast<unsigned>(n % gridDim.x), static_cast<unsigned>(n / gridDim.x % gridDim.y),
                       static_cast<unsigned>(n / gridDim.x / gridDim.y)};
        block.live = blockDim.x;
        block.arrived = 0;
        free(block.shared);
        // Exactly so many bytes: the sanitizers see what is beyond them.
        block.shared = static_cast<char *>(malloc(shared_bytes));
        if (block.shared == nullptr && shared_bytes != 0) {
            fail("the %u bytes of shared memory of a block were not to be had; free some memory", shared_bytes);
            return;
        }
        if (shared_bytes != 0) {
            std::memset(block.shared, 0xff, shared_bytes);
        }
    }
    for (size_t i = 0; i < threads; ++i) {
        Fiber &fiber = *fibers[i];
        fiber.block = &group->blocks[i / blockDim.x];
        fiber.warp = &group->warps[i / kLanes];
        fiber.thread = static_cast<unsigned>(i % blockDim.x);
        fiber.warp->arrived = 0;
        // The array of the paused is free until somebody runs.
        launch.paused[i] = &fiber;
    }
    launch.live = threads;
    launch.head = launch.count = launch.paused_count = 0;
    launch.fruitless = 0;
    make_ready(launch.paused.data(), threads);
    go_on();
    if (launch.failed) {
        abandon(threads);
    }
}

void run_grid(unsigned shared_bytes, bool cooperative) noexcept {
    const uint64_t blocks = uint64_t{gridDim.x} * gridDim.y * gridDim.z;
    const uint64_t together = cooperative ? blocks : 1, threads = together * blockDim.x;
    if (blocks > kMostBlocks) {
        fail("a launch of %llu blocks: on a processor, a launch has at most %llu; launch fewer",
             static_cast<unsigned long long>(blocks), static_cast<unsigned long long>(kMostBlocks));
        return;
    }
    if (threads > kMostFibers) {
        fail("a cooperative launch of %llu threads: on a processor, at most %zu are alive at once; launch fewer blocks",
             static_cast<unsigned long long>(threads), kMostFibers);
        return;
    }
    size_t ring = kLanes;
    while (ring < threads) {
        ring *= 2;
    }
    Group own;
    Array<uint64_t> numbers;
    if (!make_fibers(threads) || !own.blocks.allocate(together) || !own.warps.allocate(threads / kLanes) ||
        !launch.ready.allocate(ring) || !launch.paused.allocate(threads) || !numbers.allocate(blocks)) {
        fail(
            "there is not enough memory for %llu blocks of %u threads, %llu threads at once; free some or launch fewer",
            static_cast<unsigned long long>(blocks), blockDim.x, static_cast<unsigned long long>(threads));
        return;
    }
    group = &own;
    for (uint64_t i = 0; i < blocks; ++i) {
        numbers[i] = i;
    }
    if (launch.shuffled) {
        shuffle(numbers.data(), blocks, 1);
    }
    for (uint64_t i = 0; i < blocks && !launch.failed; i += together) {
        run_blocks(numbers.data() + i, together, shared_bytes);
    }
    group = nullptr;
}

bool has_fma() noexcept {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("fma");
#else
    return true;
#endif
}

// Fails where a GPU would refuse the launch.
void check_launch(const char *kernel, unsigned shared_bytes, void *const *arguments) noexcept {
    if (kernel == nullptr || arguments == nullptr || arguments[0] == nullptr) {
        fail("a launch takes the name of a kernel and a pointer to its argument; one of them is null");
        return;
    }
    for (launch.kernel = kernels; launch.kernel != nullptr; launch.kernel = launch.kernel->next) {
        if (std::strcmp(launch.kernel->name, kernel) == 0) {
            break;
        }
    }
    if (launch.kernel == nullptr) {
        fail("no kernel is called %.100s; there are: %s", kernel, affect_cuda_host_kernels());
    } else if (!has_fma()) {
        fail("%s is compiled for processors with FMA, which this one has not; take one of 2013 or later", kernel);
    } else if (blockDim.x == 0 || blockDim.x % kLanes != 0 || blockDim.x > kMostThreads) {
        fail("%s was launched with blocks of %u threads; take a multiple of %u up to %u", kernel, blockDim.x, kLanes,
             kMostThreads);
    } else if (gridDim.x == 0 || gridDim.y == 0 || gridDim.z == 0 || gridDim.x > 0x7fffffff || gridDim.y > 65535 ||
               gridDim.z > 65535) {
        fail("%s was launched with a grid of %u x %u x %u blocks; take 1 to 2147483647 x 65535 x 65535", kernel,
             gridDim.x, gridDim.y, gridDim.z);
    } else if (shared_bytes > kMostShared) {
        fail("%s was launched with %u bytes of shared memory for each block; take at most %u", kernel, shared_bytes,
             kMostShared);
    }
}

}  // namespace

Kernel::Kernel(const char *its_name, size_t its_size, void (*its_run)(const void *)) noexcept
    : name(its_name), size(its_size), run(its_run), next(kernels) {
    kernels = this;
}

uint32_t exchange(WarpOperation operation, unsigned mask, uint32_t value, unsigned source) noexcept {
    Warp &warp = *running->warp;
    if (mask != 0xffffffffu || (warp.arrived != 0 && warp.operation != operation)) {
        if (mask != 0xffffffffu) {
            fail("%s calls a warp operation with the mask 0x%08x; only the full mask is emulated", launch.kernel->name,
                 mask);
        } else {
            fail("divergent barrier in %s: thread %u of block (%u, %u, %u) calls another warp operation than its warp",
                 launch.kernel->name, threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z);
        }
        switch_to(&caller);
    }
    const unsigned turn = warp.turn, lane = threadIdx.x % kLanes;
    warp.operation = operation;
    warp.values[turn][lane] = value;
    running->state = State::at_warp;
    if (++warp.arrived == kLanes) {
        warp.arrived = 0;
        warp.turn = 1 - turn;
        release(of_block(*running->block) + threadIdx.x - lane, kLanes, State::at_warp);
    }
    go_on();
    return warp.values[turn][source];
}

void sync_block() noexcept {
    Block &block = *running->block;
    running->state = State::at_block;
    if (++block.arrived == block.live) {
        block.arrived = 0;
        release(of_block(block), blockDim.x, State::at_block);
    }
    go_on();
}

void maybe_give_way() noexcept {
    if (launch.shuffled && draw() % 2 == 0) {
        const size_t mask = launch.ready.size() - 1;
        launch.ready[(launch.head + launch.count++) & mask] = running;
        go_on();
    }
}

void note_progress() noexcept { launch.progress = true; }

}  // namespace affect::host

using namespace affect::host;

void affect_pause() {
    running->state = State::paused;
    launch.paused[launch.paused_count++] = running;
    go_on();
}

extern "C" {

int affect_cuda_host_launch(const char *kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                            unsigned shared_bytes, int cooperative, unsigned order, void *const *arguments, char *error,
                            size_t error_size) {
    pthread_mutex_lock(&mutex);
    caller.started = true;
    launch.error = error;
    launch.error_size = error_size;
    launch.failed = false;
    launch.shuffled = order != 0;
    launch.random = order;
    launch.ahead = order % 2 == 0;
    // Either way shows faults that the other hides.
    launch.drawn = order % 4 == 3;
    gridDim = {grid_x, grid_y, grid_z};
    blockDim = {block_x, 1, 1};
    check_launch(kernel, shared_bytes, arguments);
    if (!launch.failed) {
        // A copy, which is aligned and stays as it is while the kernel runs.
        affect::Array<max_align_t> parameters;
        if (parameters.allocate((launch.kernel->size + sizeof(max_align_t) - 1) / sizeof(max_align_t))) {
            std::memcpy(parameters.data(), arguments[0], launch.kernel->size);
            launch.parameters = parameters.data();
            run_grid(shared_bytes, cooperative != 0);
        } else {
            fail("there is no memory for the %zu bytes of the argument of %s", launch.kernel->size, kernel);
        }
    }
    const int result = launch.failed ? -1 : 0;
    pthread_mutex_unlock(&mutex);
    return result;
}

const char *affect_cuda_host_kernels(void) {
    // Always the same text, whoever writes it.
    static char names[1024];
    size_t used = 0;
    for (const Kernel *kernel = kernels; kernel != nullptr && used < sizeof(names); kernel = kernel->next) {
        const int written = snprintf(names + used, sizeof(names) - used, used == 0 ? "%s" : " %s", kernel->name);
        used += static_cast<size_t>(written);
    }
    return names;
}

}  // extern "C"
