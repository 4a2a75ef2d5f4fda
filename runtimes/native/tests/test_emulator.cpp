// The emulator of CUDA kernels, with kernels small enough to know what a GPU would do: sums come out the same in every
// order of threads, faults do not, and what would hang a GPU ends with a sentence.

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "../cuda/host/emulator.h"
#include "check.h"

namespace {

struct Parameters {
    const unsigned *in;
    unsigned *out;
    unsigned *counter;
    int rounds;
};

}  // namespace

// One sum for each block: within warps by shuffles, between them through shared memory. kSafe: with its barriers.
template <bool kSafe>
__device__ __forceinline__ void sum_blocks(const Parameters &p) {
    AFFECT_SHARED(shared);
    unsigned *const sums = reinterpret_cast<unsigned *>(shared);
    for (int round = 0; round < p.rounds; ++round) {
        unsigned sum = p.in[blockIdx.x * blockDim.x + threadIdx.x] + static_cast<unsigned>(round);
        for (int m = 16; m > 0; m /= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, m);
        }
        if (threadIdx.x % 32 == 0) {
            sums[threadIdx.x / 32] = sum;
        }
        __syncthreads();
        sum = 0;
        for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) {
            sum += sums[warp];
        }
        if (threadIdx.x == 0) {
            p.out[blockIdx.x * static_cast<unsigned>(p.rounds) + static_cast<unsigned>(round)] = sum;
        }
        if (kSafe) {
            // Without it, a warp ahead writes sums that one behind has yet to read.
            __syncthreads();
        }
    }
}

extern "C" {

__global__ void __launch_bounds__(1024) sum_safe(const __grid_constant__ Parameters p) { sum_blocks<true>(p); }

__global__ void sum_unsafe(const __grid_constant__ Parameters p) { sum_blocks<false>(p); }

// Each thread takes what its neighbour wrote.
__global__ void rotate_unsafe(const __grid_constant__ Parameters p) {
    AFFECT_SHARED(shared);
    unsigned *const values = reinterpret_cast<unsigned *>(shared);
    values[threadIdx.x] = p.in[threadIdx.x];
    p.out[threadIdx.x] = values[(threadIdx.x + 1) % blockDim.x];
}

// A lane's value comes from where shfl says, and threads that have returned are not waited for.
__global__ void lanes(const __grid_constant__ Parameters p) {
    const unsigned lane = threadIdx.x % 32;
    p.out[threadIdx.x] = __shfl_sync(0xffffffffu, threadIdx.x, static_cast<int>(lane * 7));
    const float half = __shfl_xor_sync(0xffffffffu, 0.5f * static_cast<float>(threadIdx.x), 1);
    __syncwarp();
    if (threadIdx.x >= 32) {
        return;
    }
    __syncthreads();
    p.out[blockDim.x + threadIdx.x] = static_cast<unsigned>(2.0f * half);
}

// All blocks meet after each round: each then reads what all the others wrote.
__global__ void meet(const __grid_constant__ Parameters p) {
    for (int round = 0; round < p.rounds; ++round) {
        if (threadIdx.x == 0) {
            p.out[static_cast<unsigned>(round) * gridDim.x + blockIdx.x] = blockIdx.x + static_cast<unsigned>(round);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();
            atomicAdd(p.counter, 1);
            while (*static_cast<volatile unsigned *>(p.counter) < (static_cast<unsigned>(round) + 1) * gridDim.x) {
                affect_pause();
            }
            __threadfence();
        }
        __syncthreads();
        for (unsigned block = 0; block < gridDim.x; ++block) {
            if (p.out[static_cast<unsigned>(round) * gridDim.x + block] != block + static_cast<unsigned>(round)) {
                atomicAdd(p.counter + 1, 1);
            }
        }
    }
}

// Where the memory of a block begins and how it is filled.
__global__ void shared_bytes(const __grid_constant__ Parameters p) {
    AFFECT_SHARED(shared);
    p.out[threadIdx.x] =
        reinterpret_cast<uintptr_t>(shared) % 16 == 0 ? reinterpret_cast<unsigned *>(shared)[threadIdx.x] : 0;
}

__global__ void where(const __grid_constant__ Parameters p) {
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    p.out[block * blockDim.x + threadIdx.x] += 1 + block;
}

__global__ void half_a_warp(const __grid_constant__ Parameters) {
    if (threadIdx.x < 16) {
        __syncthreads();
    } else {
        __syncwarp();
    }
}

__global__ void two_operations(const __grid_constant__ Parameters) {
    if (threadIdx.x % 2 == 0) {
        __syncwarp();
    } else {
        __shfl_sync(0xffffffffu, 1, 0);
    }
}

__global__ void part_of_a_warp(const __grid_constant__ Parameters) { __syncwarp(0xffffu); }

__global__ void returned_lanes(const __grid_constant__ Parameters) {
    if (threadIdx.x != 3) {
        __shfl_xor_sync(0xffffffffu, 1, 1);
    }
}

__global__ void wait_for_nobody(const __grid_constant__ Parameters p) {
    while (*static_cast<volatile unsigned *>(p.counter) == 0) {
        affect_pause();
    }
}

}  // extern "C"

AFFECT_REGISTER(sum_safe, Parameters)
AFFECT_REGISTER(sum_unsafe, Parameters)
AFFECT_REGISTER(rotate_unsafe, Parameters)
AFFECT_REGISTER(lanes, Parameters)
AFFECT_REGISTER(meet, Parameters)
AFFECT_REGISTER(shared_bytes, Parameters)
AFFECT_REGISTER(where, Parameters)
AFFECT_REGISTER(half_a_warp, Parameters)
AFFECT_REGISTER(two_operations, Parameters)
AFFECT_REGISTER(part_of_a_warp, Parameters)
AFFECT_REGISTER(returned_lanes, Parameters)
AFFECT_REGISTER(wait_for_nobody, Parameters)

namespace {

constexpr unsigned kOrders = 50;

struct Shape {
    unsigned x = 1, y = 1, z = 1, threads = 64, shared = 0;
    int cooperative = 0;
};

// What the launch says: empty where it is done.
std::string launch(const char *kernel, const Shape &shape, unsigned order, const Parameters &parameters) {
    void *const arguments[] = {const_cast<Parameters *>(&parameters)};
    char error[512] = "";
    const int result = affect_cuda_host_launch(kernel, shape.x, shape.y, shape.z, shape.threads, shape.shared,
                                               shape.cooperative, order, arguments, error, sizeof(error));
    CHECK_FOR(kernel, result == 0 || result == -1);
    CHECK_FOR(error, (result == 0) == (error[0] == '\0'));
    return error;
}

bool says(const std::string &sentence, const char *words) {
    const bool holds = sentence.find(words) != std::string::npos;
    if (!holds) {
        std::fprintf(stderr, "not in \"%s\": %s\n", sentence.c_str(), words);
    }
    return holds;
}

std::vector<unsigned> numbers(size_t count) {
    std::vector<unsigned> all(count);
    for (size_t i = 0; i < count; ++i) {
        all[i] = static_cast<unsigned>(i * i % 1009);
    }
    return all;
}

// The results of a sum over three blocks of four warps.
std::vector<unsigned> sums(const char *kernel, unsigned order) {
    const std::vector<unsigned> in = numbers(3 * 128);
    std::vector<unsigned> out(3 * 5);
    CHECK(launch(kernel, {.x = 3, .threads = 128, .shared = 16}, order, {in.data(), out.data(), nullptr, 5}).empty());
    return out;
}

void test_sums() {
    const std::vector<unsigned> in = numbers(3 * 128);
    std::vector<unsigned> expected;
    for (size_t block = 0; block < 3; ++block) {
        for (unsigned round = 0; round < 5; ++round) {
            expected.push_back(128 * round);
            for (size_t i = 0; i < 128; ++i) {
                expected.back() += in[block * 128 + i];
            }
        }
    }
    unsigned differing = 0;
    for (unsigned order = 0; order < kOrders; ++order) {
        CHECK(sums("sum_safe", order) == expected);
        const std::vector<unsigned> unsafe = sums("sum_unsafe", order);
        CHECK(unsafe == sums("sum_unsafe", order));  // an order is always the same
        differing += unsafe != expected;
    }
    CHECK(differing > kOrders / 2);
}

void test_missing_barrier() {
    const std::vector<unsigned> in = numbers(64);
    std::vector<unsigned> expected(in.begin() + 1, in.end());
    expected.push_back(in[0]);
    unsigned differing = 0;
    for (unsigned order = 0; order < kOrders; ++order) {
        std::vector<unsigned> out(64);
        CHECK(launch("rotate_unsafe", {.shared = 256}, order, {in.data(), out.data(), nullptr, 0}).empty());
        differing += out != expected;
    }
    CHECK(differing == kOrders);
}

void test_lanes() {
    for (unsigned order = 0; order < kOrders; ++order) {
        std::vector<unsigned> out(128);
        CHECK(launch("lanes", {.threads = 96}, order, {nullptr, out.data(), nullptr, 0}).empty());
        for (unsigned i = 0; i < 96; ++i) {
            CHECK(out[i] == i / 32 * 32 + i % 32 * 7 % 32);
        }
        for (unsigned i = 0; i < 32; ++i) {
            CHECK(out[96 + i] == (i ^ 1));
        }
    }
}

void test_cooperative() {
    for (unsigned order = 0; order < kOrders; ++order) {
        std::vector<unsigned> out(7 * 4);
        unsigned counters[2] = {};
        CHECK(launch("meet", {.x = 7, .cooperative = 1}, order, {nullptr, out.data(), counters, 4}).empty());
        CHECK(counters[0] == 7 * 4 && counters[1] == 0);
    }
    // Blocks that wait for others need them to be alive.
    std::vector<unsigned> out(7);
    unsigned counters[2] = {};
    CHECK(says(launch("meet", {.x = 7}, 0, {nullptr, out.data(), counters, 1}), "deadlock in meet: of the 64 threads"));
}

void test_memory_and_places() {
    std::vector<unsigned> out(64);
    CHECK(launch("shared_bytes", {.shared = 256}, 1, {nullptr, out.data(), nullptr, 0}).empty());
    CHECK(out == std::vector<unsigned>(64, 0xffffffffu));
    for (const int cooperative : {0, 1}) {
        std::vector<unsigned> places(2 * 3 * 4 * 32);
        const Shape shape{.x = 2, .y = 3, .z = 4, .threads = 32, .cooperative = cooperative};
        CHECK(launch("where", shape, 5, {nullptr, places.data(), nullptr, 0}).empty());
        for (size_t i = 0; i < places.size(); ++i) {
            CHECK(places[i] == 1 + i / 32);
        }
    }
}

void test_stops() {
    unsigned counter = 0;
    const Parameters nothing{nullptr, nullptr, &counter, 0};
    for (const unsigned order : {0u, 1u, 2u}) {
        CHECK(says(launch("half_a_warp", {}, order, nothing),
                   "divergent barrier in half_a_warp: of the 64 threads of "
                   "block (0, 0, 0), 16 wait at __syncthreads, 16 at a warp"));
        CHECK(says(launch("two_operations", {}, order, nothing), "divergent barrier in two_operations: thread"));
        CHECK(says(launch("part_of_a_warp", {}, order, nothing), "mask 0x0000ffff"));
        CHECK(says(launch("returned_lanes", {.threads = 32}, order, nothing), "1 have returned"));
        CHECK(says(launch("wait_for_nobody", {.x = 2, .cooperative = 1}, order, nothing), "64 in affect_pause"));
        // What stopped is forgotten.
        test_lanes();
    }
}

void test_refusals() {
    unsigned counter = 0;
    std::vector<unsigned> out(1024);
    const Parameters nothing{nullptr, out.data(), &counter, 0};
    CHECK(says(launch("sum", {}, 0, nothing), "no kernel is called sum; there are: "));
    CHECK(says(launch("sum", {}, 0, nothing), "sum_safe"));
    for (const unsigned threads : {0u, 31u, 48u, 1056u}) {
        CHECK(says(launch("where", {.threads = threads}, 0, nothing), "take a multiple of 32 up to 1024"));
    }
    CHECK(launch("where", {.threads = 1024}, 0, nothing).empty());
    CHECK(says(launch("where", {.x = 0}, 0, nothing), "a grid of 0 x 1 x 1 blocks"));
    CHECK(says(launch("where", {.y = 65536}, 0, nothing), "a grid of 1 x 65536 x 1 blocks"));
    CHECK(says(launch("where", {.shared = 232449}, 0, nothing), "232449 bytes of shared memory"));
    CHECK(launch("where", {.shared = 232448}, 0, nothing).empty());
    CHECK(says(launch("where", {.x = 0x7fffffff, .y = 65535}, 0, nothing), "launch fewer"));
    CHECK(says(launch("where", {.x = 0x7fffffff, .y = 65535, .cooperative = 1}, 0, nothing), "launch fewer"));
    CHECK(says(launch("where", {.x = 17, .threads = 1024, .cooperative = 1}, 0, nothing), "at most 16384 are alive"));
    CHECK(affect_cuda_host_launch("where", 1, 1, 1, 32, 0, 0, 0, nullptr, nullptr, 0) == -1);
    char error[8];
    CHECK(affect_cuda_host_launch(nullptr, 1, 1, 1, 32, 0, 0, 0, nullptr, error, sizeof(error)) == -1);
    CHECK(std::string(error) == "a launc");
    CHECK(says(std::string(" ") + affect_cuda_host_kernels() + " ", " rotate_unsafe "));
}

// Callers of several threads take turns.
void test_threads() {
    const std::vector<unsigned> expected = sums("sum_safe", 0);
    std::vector<std::thread> threads;
    bool same[4] = {};
    for (unsigned i = 0; i < 4; ++i) {
        threads.emplace_back([&, i] {
            same[i] = true;
            for (unsigned order = 0; order < 20; ++order) {
                same[i] = same[i] && sums("sum_safe", order) == expected;
            }
        });
    }
    for (std::thread &thread : threads) {
        thread.join();
    }
    CHECK(same[0] && same[1] && same[2] && same[3]);
}

// Prints what a launch of 64 threads with 20 barriers costs; asked for by name, as no test should hang on it.
void measure() {
    const std::vector<unsigned> in = numbers(64);
    std::vector<unsigned> out(10);
    for (const unsigned order : {0u, 1u}) {
        const auto begin = std::chrono::steady_clock::now();
        constexpr int kTimes = 2000;
        for (int i = 0; i < kTimes; ++i) {
            launch("sum_safe", {.shared = 16}, order, {in.data(), out.data(), nullptr, 10});
        }
        const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - begin;
        std::printf("order %u: %.1f us a launch of 64 threads with 20 block barriers and 50 shuffles\n", order,
                    took.count() / kTimes);
    }
}

}  // namespace

int main(int count, char **words) {
    if (count == 2 && std::string(words[1]) == "--measure") {
        measure();
        return 0;
    }
    test_sums();
    test_missing_barrier();
    test_lanes();
    test_cooperative();
    test_memory_and_places();
    test_stops();
    test_refusals();
    test_threads();
    return finish();
}
