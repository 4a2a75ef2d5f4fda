// What a CUDA kernel is compiled against where there is no GPU: its words for C++ on a processor.
//
// Only what the kernels of this folder use is here, so that a word with a meaning of its own on a GPU does not compile
// unnoticed: no __shared__ variables (AFFECT_SHARED alone), no masks but the full one, no parts of a warp.
// emulator.cpp runs the threads.
#ifndef AFFECT_EMULATOR_H
#define AFFECT_EMULATOR_H

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
    unsigned x, y, z;
};
using dim3 = uint3;
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Of the thread that runs: the emulator writes them whenever it goes on with another one.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace affect::host {

// Barriers of a warp. Its lanes have to meet at the same one.
enum class WarpOperation : uint8_t { syncwarp, shfl, shfl_xor };

// Gives `value` to the warp, waits for all its lanes, and returns the value of lane `source`.
uint32_t exchange(WarpOperation operation, unsigned mask, uint32_t value, unsigned source) noexcept;
void sync_block() noexcept;
// Lets other threads go first, by chance, where order matters to nobody but a kernel with a fault.
void maybe_give_way() noexcept;
void note_progress() noexcept;

// The block's dynamic shared memory, a multiple of 16.
extern char *shared_memory;

// A kernel by name. Static, one for each.
struct Kernel {
    const char *name;
    size_t size;
    void (*run)(const void *parameters);
    const Kernel *next;

    Kernel(const char *name, size_t size, void (*run)(const void *parameters)) noexcept;
};

template <class T>
T exchange_bits(WarpOperation operation, unsigned mask, T value, unsigned source) noexcept {
    static_assert(sizeof(T) == sizeof(uint32_t), "a lane of a GPU gives 32 bits at a time");
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    bits = exchange(operation, mask, bits, source);
    std::memcpy(&value, &bits, sizeof(bits));
    return value;
}

}  // namespace affect::host

inline void __syncthreads() { affect::host::sync_block(); }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
    affect::host::exchange(affect::host::WarpOperation::syncwarp, mask, 0, threadIdx.x % 32);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
    return affect::host::exchange_bits(affect::host::WarpOperation::shfl, mask, value,
                                       static_cast<unsigned>(lane) % 32);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
    return affect::host::exchange_bits(affect::host::WarpOperation::shfl_xor, mask, value,
                                       (threadIdx.x ^ static_cast<unsigned>(lanes)) % 32);
}

inline void __threadfence() { affect::host::maybe_give_way(); }

inline unsigned atomicAdd(unsigned *address, unsigned value) {
    affect::host::maybe_give_way();
    const unsigned before = *address;
    *address = before + value;
    if (value != 0) {
        affect::host::note_progress();
    }
    return before;
}

// To be called in every turn of a loop that waits for other threads to change memory: without it, they never run.
void affect_pause();

#define AFFECT_SHARED(name) char *const name = affect::host::shared_memory

// Makes a kernel known to affect_cuda_host_launch. `parameters` is the type of its one argument.
#define AFFECT_REGISTER(kernel, parameters)                          \
    static_assert(alignof(parameters) <= alignof(std::max_align_t)); \
    static const affect::host::Kernel registered_##kernel(           \
        #kernel, sizeof(parameters), [](const void *p) { kernel(*static_cast<const parameters *>(p)); });

extern "C" {

// Runs a kernel, all its threads one by one in the calling thread; one launch at a time, others wait.
//
// `arguments` is what cuLaunchKernel takes as kernelParams: here, one pointer to the kernel's one argument. Shared
// memory begins as 0xFF bytes, which are NaN. Without `cooperative`, a block begins when another has ended. `order`: 0
// runs the threads of a block in their order from barrier to barrier; any other number draws that order, and that of
// blocks, anew at every barrier, the same for the same number. A missing barrier then shows as a result that depends on
// `order`.
//
// Returns 0, or -1 and a sentence in `error`: an unknown kernel, sizes that no GPU takes, no memory, threads that wait
// for each other forever. What the kernel has written until then stays. A kernel that loops forever without
// affect_pause never returns.
__attribute__((visibility("default"))) int affect_cuda_host_launch(const char *kernel, unsigned grid_x, unsigned grid_y,
                                                                   unsigned grid_z, unsigned block_x,
                                                                   unsigned shared_bytes, int cooperative,
                                                                   unsigned order, void *const *arguments, char *error,
                                                                   size_t error_size);

// The names of all kernels, separated by spaces.
__attribute__((visibility("default"))) const char *affect_cuda_host_kernels(void);

}  // extern "C"

#endif
