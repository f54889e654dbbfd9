// The part of CUDA that the kernels use, for one CPU thread: what a kernel sees.
//
// A block's threads are fibers that run one at a time; a fiber runs until it waits at a barrier or
// for its warp, so `threadIdx` and its kind are plain globals that the scheduler sets (runtime.cpp).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <string>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Not here: `__shared__` and `<<< >>>`, which no macro can express; the build rewrites them.

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulation {

constexpr unsigned kWarp = 32;
constexpr size_t kStaticSharedLimit = 48 * 1024;  // also of dynamic memory that was not asked for
constexpr size_t kSharedLimit = 227 * 1024;       // sm_90, sm_100

[[noreturn]] void fail(const std::string &what);  // raises, naming kernel, block and thread

bool mutant(int number);  // in sources with faults put in: is this the fault that is on?

// Where in the source a thread waits: threads that wait together must wait at the same place.
struct Site {
    const char *file;
    int line;
    static Site here(const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
    bool operator==(const Site &other) const {
        return line == other.line && !std::strcmp(file, other.file);
    }
};

void wait_block(Site site);
void wait_warp(unsigned mask, Site site);

// Each of the warp's lanes gives `bytes` at `value`; afterwards `value` is what `source` gave.
void exchange(unsigned mask, void *value, size_t bytes, unsigned source, Site site);

void *static_shared(const void *declaration, size_t bytes, size_t alignment);
void *dynamic_shared();

// `__shared__ T name[..]`: one array a block and declaration. `Tag` is the type of a lambda that
// stands at the declaration, so that it differs from one to the next and between instantiations.
template <class T, class Tag>
T &shared(Tag) {
    static const char declaration = 0;
    return *static_cast<T *>(static_shared(&declaration, sizeof(T), alignof(T)));
}

// `extern __shared__ T name[]`. An array, as in CUDA, since kernels cast the name itself.
template <class T>
auto &shared_dynamic() {
    return *static_cast<T(*)[kSharedLimit / sizeof(T)]>(dynamic_shared());
}

// Raises where CUDA would fault; a thread's own variables are registers there, so they pass.
void check_address(const void *address, size_t bytes);

// CUDA's vector types, which one instruction reads or writes, from an address that is a multiple of
// their size. Their alignment for g++ is 1: kernels cast arrays of their own to them.
#define EMULATION_VECTOR(NAME, T, N, ...)                                        \
    struct __attribute__((packed)) NAME {                                        \
        T __VA_ARGS__;                                                           \
        NAME() = default;                                                        \
        template <class... U, class = std::enable_if_t<sizeof...(U) == N>>       \
        NAME(U... u) {                                                           \
            const T values[] = {T(u)...};                                        \
            std::memcpy(static_cast<void *>(this), values, sizeof(NAME));        \
        }                                                                        \
        NAME(const NAME &other) { copy(other); }                                 \
        NAME &operator=(const NAME &other) {                                     \
            copy(other);                                                         \
            return *this;                                                        \
        }                                                                        \
                                                                                 \
    private:                                                                     \
        void copy(const NAME &other) {                                           \
            emulation::check_address(&other, sizeof(NAME));                      \
            emulation::check_address(this, sizeof(NAME));                        \
            std::memcpy(static_cast<void *>(this), &other, sizeof(NAME));        \
        }                                                                        \
    }

using Kernel = std::function<void()>;
void run_grid(const void *function, dim3 grid, dim3 block, size_t shared_bytes, const Kernel &);
void allow_dynamic_shared(const void *function, size_t bytes);

// `kernel<<<grid, block, shared_bytes, stream>>>(arguments...)`, rewritten to
// `launch(kernel, grid, block, shared_bytes, stream)(arguments...)`.
template <class... Parameters>
auto launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes = 0,
            const void * = nullptr) {
    return [=](Parameters... arguments) {
        run_grid(reinterpret_cast<const void *>(kernel), grid, block, shared_bytes,
                 [&] { kernel(arguments...); });
    };
}

}  // namespace emulation

EMULATION_VECTOR(uint4, unsigned, 4, x, y, z, w);
EMULATION_VECTOR(float2, float, 2, x, y);
EMULATION_VECTOR(float4, float, 4, x, y, z, w);
struct float3 {
    float x, y, z;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#define __syncthreads() emulation::wait_block(emulation::Site::here())
inline void __syncwarp(unsigned mask = 0xffffffff, emulation::Site site = emulation::Site::here()) {
    emulation::wait_warp(mask, site);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              emulation::Site site = emulation::Site::here()) {
    const unsigned lane = threadIdx.x % 32, first = lane / width * width;
    emulation::exchange(mask, &value, sizeof(T), first + unsigned(source) % width, site);
    return value;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                  emulation::Site site = emulation::Site::here()) {
    const unsigned lane = threadIdx.x % 32, source = lane ^ lanes;
    emulation::exchange(mask, &value, sizeof(T), source / width == lane / width ? source : lane, site);
    return value;
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   emulation::Site site = emulation::Site::here()) {
    const unsigned lane = threadIdx.x % 32;
    emulation::exchange(mask, &value, sizeof(T), lane % width + delta < unsigned(width) ? lane + delta : lane, site);
    return value;
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 emulation::Site site = emulation::Site::here()) {
    const unsigned lane = threadIdx.x % 32;
    emulation::exchange(mask, &value, sizeof(T), lane % width >= delta ? lane - delta : lane, site);
    return value;
}

template <class T>
T atomicAdd(T *address, T value) {
    emulation::check_address(address, sizeof(T));
    const T old = *address;
    *address = old + value;
    return old;
}

// The host's side: one stream, which is done when a launch returns; a launch that fails raises.
using cudaStream_t = const void *;
enum cudaError_t { cudaSuccess };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class F>
cudaError_t cudaFuncSetAttribute(F *function, cudaFuncAttribute, int bytes) {
    emulation::allow_dynamic_shared(reinterpret_cast<const void *>(function), bytes);
    return cudaSuccess;
}
#define C10_CUDA_CHECK(expression) (void)(expression)
#define C10_CUDA_KERNEL_LAUNCH_CHECK() (void)0
namespace at::cuda {
struct CUDAStream {
    cudaStream_t stream() const { return nullptr; }
};
inline CUDAStream getCurrentCUDAStream(int = -1) { return {}; }
}  // namespace at::cuda
