// Runs the CUDA threads of a block as fibers of one CPU thread, and lets the lanes of a warp exchange values.
//
// A fiber runs until it reaches a barrier or an operation of its whole warp. The lanes of a warp must reach its operations, and
// the threads of a block its barriers, on one and the same line: anything else ends the launch with a message.
#pragma once
#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

struct uint3 { unsigned x, y, z; };
uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {
constexpr int WARP = 32, THREADS = 1024, CELL = 32, PAGE = 4096;
constexpr size_t STACK = 256 << 10;
enum Wait { READY, OPERATION, BARRIER, OVER };

struct Fiber {
    void* saved[5];
    ucontext_t entry;
    bool entered;
    Wait wait;
    int line;
    unsigned exchanges;
};

struct State {
    Fiber fibers[THREADS];
    char cells[2][THREADS][CELL];  // two, as a lane may reach the next operation before its neighbour has read from this one
    void* scheduler[5];
    char* stacks;
    int current = -1;  // the thread that runs, or -1
    unsigned random = 2463534242u;
    void (*body)(const void*);
    const void* context;
    char message[200];
} state;
thread_local char anchor;  // there is always a thread-local segment, allocated by touching this

// The compiler's own setjmp and longjmp save three registers, where swapcontext makes a system call at every switch.
#define EMULATED_SWITCH __attribute__((noipa, no_sanitize("address")))
EMULATED_SWITCH void jump(void** saved) { __builtin_longjmp(saved, 1); }
EMULATED_SWITCH void suspend() {
    if (!__builtin_setjmp(state.fibers[state.current].saved)) jump(state.scheduler);
}
EMULATED_SWITCH void enter(Fiber& fiber) {
    if (__builtin_setjmp(state.scheduler)) return;
    if (fiber.entered) jump(fiber.saved);
    fiber.entered = true;
    setcontext(&fiber.entry);
}

inline void fail(const char* format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(state.message, sizeof state.message, format, values);
    va_end(values);
    if (state.current >= 0) suspend();
    throw std::runtime_error(state.message);
}

inline void wait(Wait wait, int line) {
    state.fibers[state.current].wait = wait;
    state.fibers[state.current].line = line;
    suspend();
}

inline void resume(int thread) {
    state.current = thread;
    threadIdx = {unsigned(thread), 0, 0};
    enter(state.fibers[thread]);
    state.current = -1;
    if (state.message[0]) throw std::runtime_error(state.message);
}

inline void live() {  // one fiber runs its thread of one block after another
    for (;; wait(OVER, 0)) state.body(state.context);
}

inline std::vector<long long> scrambled(long long n) {
    std::vector<long long> order(n);
    for (long long i = 0; i < n; ++i) {
        for (int shift : {13, -17, 5}) state.random ^= shift > 0 ? state.random << shift : state.random >> -shift;
        long long j = static_cast<long long>(state.random) * (i + 1) >> 32;
        order[i] = order[j];
        order[j] = i;
    }
    return order;
}

// Whether any of these threads waits for this. Those that do are released, and must wait on one line.
inline int release(Wait wait, int first, int end) {
    int one = -1, waiting = 0;
    for (int t = first; t < end; ++t) {
        Fiber& fiber = state.fibers[t];
        if (fiber.wait != wait) continue;
        if (one >= 0 && fiber.line != state.fibers[one].line)
            fail("threads %d and %d of block (%u, %u, %u) wait for each other on lines %d and %d", one, t, blockIdx.x, blockIdx.y,
                 blockIdx.z, state.fibers[one].line, fiber.line);
        fiber.wait = READY;
        one = t;
        ++waiting;
    }
    if (wait == OPERATION && waiting % WARP)
        fail("line %d: %d of the 32 lanes of a warp reached an operation of the whole warp", state.fibers[one].line, waiting);
    return waiting;
}

inline void run_block(int threads) {
    for (int t = 0; t < threads; ++t) state.fibers[t].wait = READY, state.fibers[t].exchanges = 0;
    do
        for (int warp : scrambled((threads + WARP - 1) / WARP)) {
            int first = warp * WARP, end = first + WARP < threads ? first + WARP : threads;
            do
                for (int lane : scrambled(end - first))
                    if (state.fibers[first + lane].wait == READY) resume(first + lane);
            while (release(OPERATION, first, end));
        }
    while (release(BARRIER, 0, threads));
}

inline int poison(dl_phdr_info* module, size_t, void*) {
    const auto *segments = module->dlpi_phdr, *end = segments + module->dlpi_phnum;
    bool mine = false;
    for (auto* s = segments; s < end; ++s)
        mine |= s->p_type == PT_LOAD && uintptr_t(&state) - (module->dlpi_addr + s->p_vaddr) < s->p_memsz;
    for (auto* s = segments; mine && s < end; ++s)
        if (s->p_type == PT_TLS) memset(module->dlpi_tls_data, 0xff, s->p_memsz);
    return mine;
}

template <class F>
const char* run(const F& body, const unsigned* grid, int threads) {
    state.body = [](const void* f) { (*static_cast<const F*>(f))(); };
    state.context = &body;
    state.message[0] = 0;
    if (!state.stacks)
        state.stacks = static_cast<char*>(mmap(nullptr, THREADS * STACK, PROT_READ | PROT_WRITE,
                                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (int t = 0; t < threads; ++t) {
        Fiber& fiber = state.fibers[t];
        if (fiber.entered) continue;
        getcontext(&fiber.entry);
        fiber.entry.uc_stack.ss_sp = state.stacks + t * STACK;
        fiber.entry.uc_stack.ss_size = STACK;
        mprotect(state.stacks + t * STACK, PAGE, PROT_NONE);  // an overflow is a fault, not another thread's variables
        makecontext(&fiber.entry, live, 0);
    }
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {unsigned(threads), 1, 1};
    *static_cast<volatile char*>(&anchor) = 0;
    try {
        for (long long b : scrambled(1LL * grid[0] * grid[1] * grid[2])) {
            blockIdx = {unsigned(b % grid[0]), unsigned(b / grid[0] % grid[1]), unsigned(b / grid[0] / grid[1])};
            dl_iterate_phdr(poison, nullptr);
            run_block(threads);
        }
    } catch (const std::runtime_error&) {
        for (Fiber& fiber : state.fibers) fiber.entered = false;
        state.current = -1;
        return state.message;
    }
    return nullptr;
}

template <class... P, size_t... I>
const char* launch(void (*kernel)(P...), const unsigned* grid, int threads, void** arguments, std::index_sequence<I...>) {
    return run([=] { kernel(*static_cast<P*>(arguments[I])...); }, grid, threads);
}
template <class... P>
const char* launch(void (*kernel)(P...), const unsigned* grid, int threads, void** arguments) {
    return launch(kernel, grid, threads, arguments, std::index_sequence_for<P...>());
}

// Gives every lane of the warp this lane's value: a function from a lane to its value.
template <class T>
auto exchange(const T& mine, int line, unsigned mask = ~0u) {
    static_assert(sizeof(T) <= CELL);
    if (mask != ~0u) fail("line %d: an operation of part of a warp (mask %08x) is not emulated", line, mask);
    Fiber& self = state.fibers[state.current];
    auto* cells = &state.cells[self.exchanges++ % 2][state.current / WARP * WARP];
    memcpy(cells[state.current % WARP], &mine, sizeof mine);
    wait(OPERATION, line);
    return [cells](int lane) {
        T value;
        memcpy(&value, cells[lane], sizeof value);
        return value;
    };
}
}  // namespace emulated
