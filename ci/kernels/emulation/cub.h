// The part of CUB's block collectives that the kernels use, with CUB's own use of shared memory and
// its barriers, so that a caller who forgets one between two uses of the memory is found.
#pragma once

#include "cuda.h"

namespace cub {

enum BlockLoadAlgorithm { BLOCK_LOAD_DIRECT, BLOCK_LOAD_WARP_TRANSPOSE };
enum BlockStoreAlgorithm { BLOCK_STORE_DIRECT, BLOCK_STORE_WARP_TRANSPOSE };

// Items change places within a warp, by way of shared memory: from striped (lane, lane + 32, ...)
// to blocked (each lane's own are neighbours), or back.
template <class T, int kThreads, int kItems>
struct WarpExchange {
    static_assert(kThreads % 32 == 0);
    struct alignas(16) TempStorage {  // as CUB's: callers put vectors behind it
        T items[kThreads * kItems];
    };
    T *warp;
    int lane;
    explicit WarpExchange(TempStorage &storage)
        : warp(storage.items + threadIdx.x / 32 * 32 * kItems), lane(threadIdx.x % 32) {}
    void striped_to_blocked(T (&items)[kItems]) {
        for (int i = 0; i < kItems; ++i) { warp[i * 32 + lane] = items[i]; }
        __syncwarp();
        for (int i = 0; i < kItems; ++i) { items[i] = warp[lane * kItems + i]; }
    }
    void blocked_to_striped(T (&items)[kItems]) {
        for (int i = 0; i < kItems; ++i) { warp[lane * kItems + i] = items[i]; }
        __syncwarp();
        for (int i = 0; i < kItems; ++i) { items[i] = warp[i * 32 + lane]; }
    }
};

// Calls visit(i, offset of the thread's item i): blocked, or striped within the thread's warp.
template <int kItems, bool kStriped, class Visit>
void each_item(Visit visit) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int i = 0; i < kItems; ++i) {
        visit(i, kStriped ? warp * 32 * kItems + i * 32 + lane : int(threadIdx.x) * kItems + i);
    }
}

template <class T, int kThreads, int kItems, BlockLoadAlgorithm kAlgorithm = BLOCK_LOAD_DIRECT>
struct BlockLoad {
    static constexpr bool kStriped = kAlgorithm == BLOCK_LOAD_WARP_TRANSPOSE;
    using Exchange = WarpExchange<T, kThreads, kItems>;
    struct Nothing {};
    using TempStorage = std::conditional_t<kStriped, typename Exchange::TempStorage, Nothing>;
    TempStorage &storage;
    explicit BlockLoad(TempStorage &storage) : storage(storage) {}

    void Load(const T *from, T (&items)[kItems]) { Load(from, items, kThreads * kItems); }
    // Items from `valid` on keep what they have.
    void Load(const T *from, T (&items)[kItems], int valid) {
        each_item<kItems, kStriped>([&](int i, int offset) {
            if (offset < valid) { items[i] = from[offset]; }
        });
        if constexpr (kStriped) { Exchange(storage).striped_to_blocked(items); }
    }
    template <class Default>
    void Load(const T *from, T (&items)[kItems], int valid, Default otherwise) {
        for (T &item : items) { item = otherwise; }
        Load(from, items, valid);
    }
};

template <class T, int kThreads, int kItems, BlockStoreAlgorithm kAlgorithm = BLOCK_STORE_DIRECT>
struct BlockStore {
    static constexpr bool kStriped = kAlgorithm == BLOCK_STORE_WARP_TRANSPOSE;
    using Exchange = WarpExchange<T, kThreads, kItems>;
    struct Striped : Exchange::TempStorage {
        int valid;
    };
    struct Nothing {};
    using TempStorage = std::conditional_t<kStriped, Striped, Nothing>;
    TempStorage &storage;
    explicit BlockStore(TempStorage &storage) : storage(storage) {}

    void Store(T *to, T (&items)[kItems]) {
        if constexpr (kStriped) { Exchange(storage).blocked_to_striped(items); }
        write(to, items, kThreads * kItems);
    }
    void Store(T *to, T (&items)[kItems], int valid) {
        if constexpr (kStriped) {
            Exchange(storage).blocked_to_striped(items);
            // CUB keeps the count in shared memory, and so has a barrier here.
            if (threadIdx.x == 0) { storage.valid = valid; }
            __syncthreads();
            valid = storage.valid;
        }
        write(to, items, valid);
    }

private:
    void write(T *to, const T (&items)[kItems], int valid) {
        each_item<kItems, kStriped>([&](int i, int offset) {
            if (offset < valid) { to[offset] = items[i]; }
        });
    }
};

template <class T, int kThreads>
struct BlockReduce {
    static_assert(kThreads % 32 == 0);
    struct TempStorage {
        T warps[kThreads / 32];
    };
    TempStorage &storage;
    explicit BlockReduce(TempStorage &storage) : storage(storage) {}

    // Thread 0 has the sum; the others have rubbish, as CUB documents: NaN here.
    T Sum(T value) {
        for (unsigned delta = 1; delta < 32; delta *= 2) {
            const T other = __shfl_down_sync(0xffffffff, value, delta);
            if (threadIdx.x % 32 + delta < 32) { value = value + other; }
        }
        if (threadIdx.x % 32 == 0) { storage.warps[threadIdx.x / 32] = value; }
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int warp = 1; warp < kThreads / 32; ++warp) { value = value + storage.warps[warp]; }
        } else {
            std::memset(static_cast<void *>(&value), 0xff, sizeof(T));
        }
        return value;
    }
};

}  // namespace cub
