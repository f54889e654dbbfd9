// The part of CUB that the selective scan uses beside cub.h: block scans that start from a callback's
// value, the exchange between a block's threads, and the pieces its own reverse scan is built from.
// Shared memory and barriers are used as CUB uses them; what CUB leaves undefined is NaN here.
#pragma once

#include <c10/core/Device.h>
#include <c10/util/Half.h>

#include "cub.h"

#define CUB_WARP_THREADS(arch) 32

namespace cub {

enum BlockScanAlgorithm { BLOCK_SCAN_RAKING, BLOCK_SCAN_WARP_SCANS };

template <int N>
struct Log2 {
    static constexpr int VALUE = N > 1 ? 1 + Log2<N / 2>::VALUE : 0;
};
template <>
struct Log2<0> {
    static constexpr int VALUE = 0;
};

template <class T>
struct Uninitialized {
    alignas(T) char bytes[sizeof(T)];
    T &Alias() { return reinterpret_cast<T &>(*this); }
};

inline unsigned RowMajorTid(int, int, int) { return threadIdx.x; }

template <int kLanes>
unsigned WarpMask(unsigned warp) {
    return kLanes == 32 ? 0xffffffffu : ((1u << kLanes % 32) - 1) << warp * kLanes;
}

template <int kLanes, class T>
T ShuffleIndex(T value, int source, unsigned mask,
               emulation::Site site = emulation::Site::here()) {
    return __shfl_sync(mask, value, source, kLanes, site);
}

// Lanes whose source lies beyond last_lane keep their own value.
template <int kLanes, class T>
T ShuffleDown(T value, int delta, int last_lane, unsigned mask,
              emulation::Site site = emulation::Site::here()) {
    const T other = __shfl_down_sync(mask, value, delta, kLanes, site);
    return int(threadIdx.x % kLanes) + delta <= last_lane ? other : value;
}

// One warp's exclusive scan. Lane 0 gets NaN, as nothing stands before it; all lanes the aggregate.
template <class T, class Op>
T warp_exclusive_scan(T value, T &aggregate, Op op) {
    const int lane = threadIdx.x % 32;
    for (int delta = 1; delta < 32; delta *= 2) {
        const T other = __shfl_up_sync(0xffffffff, value, delta);
        if (lane >= delta) { value = op(other, value); }
    }
    aggregate = __shfl_sync(0xffffffff, value, 31);
    T exclusive = __shfl_up_sync(0xffffffff, value, 1);
    if (lane == 0) { std::memset(static_cast<void *>(&exclusive), 0xff, sizeof(T)); }
    return exclusive;
}

// One slot per thread, in segments that a single warp can walk, one segment a lane.
template <class T, int kThreads>
struct BlockRakingLayout {
    static_assert(kThreads % 32 == 0);
    static constexpr bool UNGUARDED = true;
    static constexpr int RAKING_THREADS = 32;
    static constexpr int SEGMENT_LENGTH = kThreads / 32;
    struct TempStorage {
        T slots[kThreads];
    };
    static T *PlacementPtr(TempStorage &storage, unsigned thread) { return storage.slots + thread; }
    static T *RakingPtr(TempStorage &storage, unsigned thread) {
        return storage.slots + thread * SEGMENT_LENGTH;
    }
};

template <class T, int kThreads, BlockScanAlgorithm kAlgorithm = BLOCK_SCAN_RAKING>
struct BlockScan {
    static constexpr int kWarps = kThreads / 32;
    using Layout = BlockRakingLayout<T, kThreads>;
    struct TempStorage {
        typename Layout::TempStorage grid;  // raking
        T warps[kWarps], prefix;            // warp scans
    };
    TempStorage &storage;
    explicit BlockScan(TempStorage &storage) : storage(storage) {}

    // The first warp calls `callback` with the block's aggregate; what lane 0 gets back precedes
    // the block's first item.
    template <int kItems, class Op, class Callback>
    void InclusiveScan(T (&input)[kItems], T (&output)[kItems], Op op, Callback &callback) {
        T value = input[0];
        for (int i = 1; i < kItems; ++i) { value = op(value, input[i]); }
        if constexpr (kAlgorithm == BLOCK_SCAN_WARP_SCANS) {
            value = by_warp_scans(value, op, callback);
        } else {
            value = by_raking(value, op, callback);
        }
        for (int i = 0; i < kItems; ++i) { output[i] = value = op(value, input[i]); }
    }

private:
    template <class Op, class Callback>
    T by_warp_scans(T value, Op op, Callback &callback) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        T aggregate, exclusive = warp_exclusive_scan(value, aggregate, op);
        if (lane == 31) { storage.warps[warp] = aggregate; }
        __syncthreads();
        aggregate = storage.warps[0];
        for (int other = 1; other < kWarps; ++other) {
            if (other == warp) { exclusive = lane == 0 ? aggregate : op(aggregate, exclusive); }
            aggregate = op(aggregate, storage.warps[other]);
        }
        if (warp == 0) {
            const T prefix = callback(aggregate);
            if (lane == 0) { storage.prefix = prefix; }
        }
        __syncthreads();
        const T prefix = storage.prefix;
        return threadIdx.x == 0 ? prefix : op(prefix, exclusive);
    }

    template <class Op, class Callback>
    T by_raking(T value, Op op, Callback &callback) {
        T aggregate;
        if constexpr (kWarps == 1) {  // no barrier then: the warp has all there is
            const T exclusive = warp_exclusive_scan(value, aggregate, op);
            const T prefix = __shfl_sync(0xffffffff, T(callback(aggregate)), 0);
            return threadIdx.x == 0 ? prefix : op(prefix, exclusive);
        } else {
            T *slot = Layout::PlacementPtr(storage.grid, threadIdx.x);
            *slot = value;
            __syncthreads();
            if (threadIdx.x < 32) {
                T *segment = Layout::RakingPtr(storage.grid, threadIdx.x);
                T partial = segment[0];
                for (int i = 1; i < kWarps; ++i) { partial = op(partial, segment[i]); }
                const T exclusive = warp_exclusive_scan(partial, aggregate, op);
                const T prefix = __shfl_sync(0xffffffff, T(callback(aggregate)), 0);
                T running = threadIdx.x == 0 ? prefix : op(prefix, exclusive);
                for (int i = 0; i < kWarps; ++i) {
                    const T own = segment[i];
                    segment[i] = running;
                    running = op(running, own);
                }
            }
            __syncthreads();
            return *slot;
        }
    }
};

// Items change places within the block: from blocked to striped (thread, thread + kThreads, ...).
template <class T, int kThreads, int kItems>
struct BlockExchange {
    struct TempStorage {
        T items[kThreads * kItems];
    };
    TempStorage &storage;
    explicit BlockExchange(TempStorage &storage) : storage(storage) {}

    void BlockedToStriped(const T (&input)[kItems], T (&output)[kItems]) {
        for (int i = 0; i < kItems; ++i) { storage.items[threadIdx.x * kItems + i] = input[i]; }
        __syncthreads();
        for (int i = 0; i < kItems; ++i) { output[i] = storage.items[i * kThreads + threadIdx.x]; }
    }
};

}  // namespace cub

// What else the selective scan asks of CUDA and torch.
struct half2 {
    c10::Half x, y;
};
inline float2 __half22float2(half2 pair) { return {float(pair.x), float(pair.y)}; }

template <class T>
T gpuAtomicAdd(T *address, T value) {
    return atomicAdd(address, value);
}

namespace at::cuda {
struct CUDAGuard {
    explicit CUDAGuard(c10::Device) {}
};
}  // namespace at::cuda

namespace cuda::std {
using namespace ::std;
}
