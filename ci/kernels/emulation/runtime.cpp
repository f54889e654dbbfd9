// How blocks are run: fibers, their order, barriers, shared memory, and the checks of a launch.
#include "cuda.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdlib>
#include <exception>
#include <map>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) (void)0
#define ASAN_UNPOISON_MEMORY_REGION(address, size) (void)0
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {
namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kGuard = 256;  // bytes between arrays in shared memory
constexpr int kUnset = 0xff;    // every byte of memory that nobody has written: NaN in all types
constexpr size_t kStack = 128 * 1024;

enum class State { kReady, kAtBarrier, kInWarp, kDone };
constexpr const char *kStateNames[] = {"is ready", "waits at the barrier", "waits for its warp", "has exited"};

struct Fiber {
    ucontext_t context;
    jmp_buf place;
    char *stack = nullptr;
    enum { kNew, kCreated, kEntered } phase = kNew;  // entered: stands in fiber_main
    State state;
    Site site;
    unsigned mask, source;            // of an exchange
    char given[16], taken[16];
};

enum class Order { kForward, kReverse, kRandom };
Order order = Order::kForward;
std::mt19937 generator;

std::vector<Fiber> fibers;
ucontext_t scheduler;
jmp_buf scheduler_place;
unsigned threads, running, at_barrier;
bool inside = false, released = false;  // released: all have come to a barrier
std::exception_ptr error;
const Kernel *kernel;
const void *function = nullptr;  // that of the launch that is under way
std::map<const void *, size_t> allowed_dynamic;

std::string kernel_name() {
    Dl_info info;
    if (!dladdr(function, &info) || !info.dli_sname) { return "a kernel"; }
    char *name = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr);
    std::string text = name ? name : info.dli_sname;
    std::free(name);
    text = text.substr(0, text.rfind('('));
    return text.starts_with("void ") ? text.substr(5) : text;
}

std::string triple(unsigned x, unsigned y, unsigned z) {
    return "(" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
}

std::string describe(unsigned thread) {
    const Fiber &fiber = fibers[thread];
    std::string text = "thread " + std::to_string(thread) + " " + kStateNames[int(fiber.state)];
    if (fiber.state != State::kDone) {
        text += std::string(" in ") + fiber.site.file + ":" + std::to_string(fiber.site.line);
    }
    return text;
}

// --- Fibers -------------------------------------------------------------------------------------

// swapcontext saves the signal mask, by a system call; _longjmp does the same without. It needs a
// context only to get onto a new stack. The address sanitizer wants to be told, and no longjmp.
#ifdef __SANITIZE_ADDRESS__
const void *main_stack;
size_t main_stack_size;
#endif

void to_scheduler() {
    Fiber &fiber = fibers[running];
#ifdef __SANITIZE_ADDRESS__
    void *fake;
    __sanitizer_start_switch_fiber(&fake, main_stack, main_stack_size);
    swapcontext(&fiber.context, &scheduler);
    __sanitizer_finish_switch_fiber(fake, &main_stack, &main_stack_size);
#else
    if (!_setjmp(fiber.place)) { _longjmp(scheduler_place, 1); }
#endif
}

void to_fiber(Fiber &fiber) {
#ifdef __SANITIZE_ADDRESS__
    void *fake;
    __sanitizer_start_switch_fiber(&fake, fiber.stack, kStack);
    swapcontext(&scheduler, &fiber.context);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    if (_setjmp(scheduler_place)) { return; }
    if (fiber.phase == Fiber::kEntered) { _longjmp(fiber.place, 1); }
    fiber.phase = Fiber::kEntered;
    setcontext(&fiber.context);
#endif
}

void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_stack_size);
#endif
    for (;;) {  // one round a block
        try {
            (*kernel)();
        } catch (...) {
            error = std::current_exception();
        }
        fibers[running].state = State::kDone;
        to_scheduler();
    }
}

void create(Fiber &fiber) {
    if (!fiber.stack) {
        const size_t page = sysconf(_SC_PAGESIZE);
        void *memory = mmap(nullptr, kStack + page, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) { throw std::runtime_error("no memory for a fiber's stack"); }
        mprotect(memory, page, PROT_NONE);
        fiber.stack = static_cast<char *>(memory) + page;
    }
    ASAN_UNPOISON_MEMORY_REGION(fiber.stack, kStack);
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack, 0, kStack};
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
    fiber.phase = Fiber::kCreated;
}

void resume(unsigned thread) {
    running = thread;
    threadIdx = {thread % blockDim.x, thread / blockDim.x % blockDim.y,
                 thread / blockDim.x / blockDim.y};
    inside = true;
    to_fiber(fibers[thread]);
    inside = false;
}

// --- Shared memory ------------------------------------------------------------------------------

struct Array {
    const void *declaration;
    size_t offset, bytes;
};
constexpr size_t kArena = kSharedLimit + 64 * kGuard;
alignas(1024) char arena[kArena];
std::vector<Array> arrays;  // the first is the dynamic one
size_t arena_used, static_bytes;

// Unset, or poisoned for the address sanitizer, are also the guard zones around each array.
void *add_array(const void *declaration, size_t bytes, size_t alignment) {
    const size_t offset = (arena_used + kGuard + alignment - 1) / alignment * alignment;
    const size_t end = offset + bytes + kGuard;
    if (end > kArena) { fail("more arrays in shared memory than expected"); }
    ASAN_UNPOISON_MEMORY_REGION(arena + arena_used, end - arena_used);
    std::memset(arena + arena_used, kUnset, end - arena_used);
    ASAN_POISON_MEMORY_REGION(arena + arena_used, offset - arena_used);
    ASAN_POISON_MEMORY_REGION(arena + offset + bytes, kGuard);
    arena_used = offset + bytes;
    arrays.push_back({declaration, offset, bytes});
    return arena + offset;
}

void check_guards() {
#ifndef __SANITIZE_ADDRESS__
    size_t end = 0;
    const auto check = [&](size_t next) {
        for (; end < next; ++end) {
            if (arena[end] != char(kUnset)) { fail("wrote outside of its shared memory"); }
        }
    };
    for (const Array &array : arrays) {
        check(array.offset);
        end = array.offset + array.bytes;
    }
    check(arena_used + kGuard);
#endif
}

// --- Blocks -------------------------------------------------------------------------------------

// Runs ready threads until none of those in `sequence` is, or until a barrier lets others go first;
// true if any was.
bool sweep(const std::vector<unsigned> &sequence) {
    bool any = false, again = true;
    while (again) {
        again = false;
        for (unsigned thread : sequence) {
            if (fibers[thread].state != State::kReady) { continue; }
            resume(thread);
            any = again = true;
            if (error || (order == Order::kRandom && std::exchange(released, false))) { return any; }
        }
    }
    return any;
}

void run_threads(size_t dynamic_bytes) {
    arrays.clear();
    arena_used = static_bytes = at_barrier = 0;
    add_array(nullptr, dynamic_bytes, 1024);
    std::vector<unsigned> eager, starved;  // starved threads run only when no eager one can
    for (unsigned thread = 0; thread < threads; ++thread) {
        fibers[thread].state = State::kReady;
        if (fibers[thread].phase == Fiber::kNew) { create(fibers[thread]); }
        eager.push_back(order == Order::kReverse ? threads - 1 - thread : thread);
    }
    for (;;) {
        if (order == Order::kRandom) {
            const unsigned hungry = generator();  // one bit a warp
            eager.clear();
            starved.clear();
            for (unsigned thread = 0; thread < threads; ++thread) {
                (hungry >> thread / kWarp & 1 ? starved : eager).push_back(thread);
            }
            std::shuffle(eager.begin(), eager.end(), generator);
            std::shuffle(starved.begin(), starved.end(), generator);
        }
        const bool any = sweep(eager) || sweep(starved);
        if (error) { std::rethrow_exception(std::exchange(error, nullptr)); }
        if (!any) { break; }
    }
    // Nobody can go on: either all are done, or some wait for others that will never come.
    for (unsigned thread = 0; thread < threads; ++thread) {
        if (fibers[thread].state == State::kDone) { continue; }
        unsigned other = 0;
        while (other + 1 < threads && fibers[other].state == fibers[thread].state) { ++other; }
        fail("divergent barrier: " + describe(thread) + ", but " + describe(other));
    }
    check_guards();
}

void run_block(size_t dynamic_bytes) {
    try {
        run_threads(dynamic_bytes);
    } catch (...) {
        // Fibers that stand in the middle of the kernel cannot go on: they begin anew.
        for (Fiber &fiber : fibers) { fiber.phase = Fiber::kNew; }
        throw;
    }
}

void require(unsigned long found, unsigned long least, unsigned long most, const char *what) {
    if (found < least || found > most) {
        fail(std::string("invalid launch: ") + what + " is " + std::to_string(found) + ", must be " +
             std::to_string(least) + " to " + std::to_string(most));
    }
}

}  // namespace

void fail(const std::string &what) {
    std::string where;
    if (inside) {
        where = ", block " + triple(blockIdx.x, blockIdx.y, blockIdx.z) + ", thread " +
                triple(threadIdx.x, threadIdx.y, threadIdx.z);
    }
    if (function) { where = kernel_name() + where + ": "; }
    throw std::runtime_error("CUDA emulation: " + where + what);
}

void check_address(const void *address, size_t bytes) {
    const auto number = reinterpret_cast<uintptr_t>(address);
    if (number % bytes == 0 || !inside) { return; }
    const auto stack = reinterpret_cast<uintptr_t>(fibers[running].stack);
    if (number - stack < kStack) { return; }
    char text[64];
    std::snprintf(text, sizeof text, "misaligned address %p: an access of %zu bytes", address, bytes);
    fail(text);
}

void wait_block(Site site) {
    Fiber &fiber = fibers[running];
    fiber.state = State::kAtBarrier;
    fiber.site = site;
    if (++at_barrier == threads) {
        for (unsigned thread = 0; thread < threads; ++thread) {
            if (!(fibers[thread].site == site)) {
                fail("divergent barrier: " + describe(running) + ", but " + describe(thread));
            }
        }
        for (unsigned thread = 0; thread < threads; ++thread) { fibers[thread].state = State::kReady; }
        at_barrier = 0;
        released = true;
    }
    to_scheduler();
}

void exchange(unsigned mask, void *value, size_t bytes, unsigned source, Site site) {
    Fiber &fiber = fibers[running];
    const unsigned first = running / kWarp * kWarp;
    if (!(mask >> (running - first) & 1)) { fail("a lane that is not in its own warp mask"); }
    if (bytes > sizeof fiber.given) { fail("a shuffle of more than 16 bytes"); }
    fiber.state = State::kInWarp;
    fiber.site = site;
    fiber.mask = mask;
    fiber.source = first + source;
    std::memcpy(fiber.given, value, bytes);
    bool complete = true;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
        if (!(mask >> lane & 1)) { continue; }
        if (first + lane >= threads) { fail("a warp mask that names a lane that does not exist"); }
        const Fiber &other = fibers[first + lane];
        complete &= other.state == State::kInWarp && other.mask == mask && other.site == site;
    }
    for (unsigned lane = 0; complete && lane < kWarp; ++lane) {
        if (!(mask >> lane & 1)) { continue; }
        Fiber &other = fibers[first + lane];
        if (mask >> (other.source - first) & 1) {
            std::memcpy(other.taken, fibers[other.source].given, bytes);
        } else {
            std::memset(other.taken, kUnset, bytes);  // that lane takes no part: rubbish
        }
        other.state = State::kReady;
    }
    to_scheduler();
    std::memcpy(value, fiber.taken, bytes);
}

void wait_warp(unsigned mask, Site site) {
    char nothing;
    exchange(mask, &nothing, 0, running % kWarp, site);
}

void *static_shared(const void *declaration, size_t bytes, size_t alignment) {
    for (const Array &array : arrays) {
        if (array.declaration == declaration) { return arena + array.offset; }
    }
    static_bytes += bytes;
    require(static_bytes, 0, kStaticSharedLimit, "static shared memory");
    require(static_bytes + arrays[0].bytes, 0, kSharedLimit, "shared memory");
    // nvcc aligns what kernels cast to vector types; 16 is the most that they need.
    return add_array(declaration, bytes, std::max<size_t>(alignment, 16));
}

void *dynamic_shared() { return arena + arrays[0].offset; }

void allow_dynamic_shared(const void *of, size_t bytes) { allowed_dynamic[of] = bytes; }

void run_grid(const void *of, dim3 grid, dim3 block, size_t shared_bytes, const Kernel &run) {
    function = of;
    struct Ends {
        ~Ends() { function = nullptr; }
    } ends;
    require(grid.x, 1, 2147483647, "gridDim.x");
    require(grid.y, 1, 65535, "gridDim.y");
    require(grid.z, 1, 65535, "gridDim.z");
    require(block.x, 1, 1024, "blockDim.x");
    require(block.y, 1, 1024, "blockDim.y");
    require(block.z, 1, 64, "blockDim.z");
    require(1ul * block.x * block.y * block.z, 1, kMaxThreads, "a block's number of threads");
    require(shared_bytes, 0, kSharedLimit, "dynamic shared memory");
    const auto allowed = allowed_dynamic.find(of);
    require(shared_bytes, 0,
            std::max(kStaticSharedLimit, allowed == allowed_dynamic.end() ? 0 : allowed->second),
            "dynamic shared memory without cudaFuncSetAttribute");
    kernel = &run;
    gridDim = grid;
    blockDim = block;
    threads = block.x * block.y * block.z;
    fibers.reserve(kMaxThreads);  // contexts hold pointers to themselves: they must not move
    if (fibers.size() < threads) { fibers.resize(threads); }
    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
    std::vector<unsigned> shuffled;
    if (order == Order::kRandom && blocks <= 1 << 20) {
        shuffled.resize(blocks);
        std::iota(shuffled.begin(), shuffled.end(), 0u);
        std::shuffle(shuffled.begin(), shuffled.end(), generator);
    }
    for (uint64_t i = 0; i < blocks; ++i) {
        const uint64_t block =
            !shuffled.empty() ? shuffled[i] : order == Order::kReverse ? blocks - 1 - i : i;
        blockIdx = {unsigned(block % grid.x), unsigned(block / grid.x % grid.y),
                    unsigned(block / grid.x / grid.y)};
        run_block(shared_bytes);
    }
}

int mutant_chosen = 0;
bool mutant(int number) { return number == mutant_chosen; }

}  // namespace emulation

extern "C" void emulation_mutant(int number) { emulation::mutant_chosen = number; }

extern "C" void emulation_order(int which, unsigned seed) {
    emulation::order = emulation::Order(which);
    emulation::generator.seed(seed);
}
