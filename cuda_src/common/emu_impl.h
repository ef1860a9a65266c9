// The emulator's scheduler; emu.h says what it does. Included once, by emu.cpp.
#pragma once

#include <sys/mman.h>

#include "emu.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace dsp_emu {
namespace {

constexpr size_t kStackBytes = 256 << 10;  // reserved a fiber; a page is taken only once it is touched
constexpr unsigned kMostThreads = 1024;

// -- changing from one stack to another -----------------------------------------------------------------------------

#if defined(__x86_64__)
// What a function must leave as it found it, and nothing else: swapcontext also makes a system call for signals.
struct Context {
  void* stack_pointer;
};
extern "C" void dsp_emu_switch(void** save, void* load);
asm(R"(
.text
.globl dsp_emu_switch
.hidden dsp_emu_switch
.type dsp_emu_switch,@function
dsp_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size dsp_emu_switch,.-dsp_emu_switch
)");

void prepare(Context& context, char* stack, void (*entry)()) {
  auto* top = reinterpret_cast<uint64_t*>(stack + kStackBytes);
  *--top = 0;  // where entry would return to; it never does, and its stack is aligned as after a call
  *--top = reinterpret_cast<uint64_t>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = 0;
  context.stack_pointer = top;
}
void change(Context& from, Context& to) { dsp_emu_switch(&from.stack_pointer, to.stack_pointer); }
#else
struct Context {
  ucontext_t context;
};
void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = kStackBytes;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}
void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif

// -- one block ------------------------------------------------------------------------------------------------------

enum class State : uint8_t { kReady, kAtBarrier, kInExchange, kLeft };

struct Fiber {
  Context context;
  State state;
  Place waits_at;
  Exchange kind;
  int source_lane;
  uint64_t value;   // handed in
  uint64_t result;  // taken
};

struct Block {
  unsigned index = 0, grid = 0, threads = 0;
  unsigned current = 0;  // the thread that runs
  unsigned left = 0, at_barrier = 0;
  std::vector<Fiber> fibers;
  Context scheduler;
  const std::function<void()>* body = nullptr;
  void* dynamic_shared = nullptr;
  uint64_t random = 0;
  std::string error;
#if defined(__SANITIZE_ADDRESS__)
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
#endif
};

Block* block = nullptr;   // the one that runs
char* stacks = nullptr;   // of all fibers, kept from launch to launch

char* stack_of(unsigned thread) { return stacks + thread * kStackBytes; }

void fail(const std::string& why) {
  if (block->error.empty()) block->error = "block " + std::to_string(block->index) + ": " + why;
}

std::string text(Place place) {
  const char* slash = strrchr(place.file, '/');
  return std::string(slash ? slash + 1 : place.file) + ":" + std::to_string(place.line);
}

std::string who(unsigned thread) {
  return "thread " + std::to_string(thread) + " (" + text(block->fibers[thread].waits_at) + ")";
}

// To the scheduler, and back once it lets this fiber go on. The sanitizer has to be told of either change.
void leave(bool for_good) {
  Fiber& fiber = block->fibers[block->current];
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack, block->scheduler_stack,
                                 block->scheduler_stack_bytes);
#else
  (void)for_good;
#endif
  change(fiber.context, block->scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, &block->scheduler_stack, &block->scheduler_stack_bytes);
#endif
}

void enter(unsigned thread) {
  block->current = thread;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, stack_of(thread), kStackBytes);
#endif
  change(block->scheduler, block->fibers[thread].context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void run_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_stack_bytes);
#endif
  (*block->body)();
  block->fibers[block->current].state = State::kLeft;
  ++block->left;
  leave(/*for_good=*/true);
  abort();  // nobody lets it go on
}

// Lets a warp go on whose threads have all handed in.
void finish_exchange(unsigned thread) {
  const unsigned first = thread / DSP_EMU_WARP * DSP_EMU_WARP;
  const unsigned last = std::min(first + DSP_EMU_WARP, block->threads);
  Fiber* fibers = block->fibers.data();
  for (unsigned i = first; i < last; ++i)
    if (fibers[i].state != State::kInExchange) return;
  uint64_t bits = 0;
  for (unsigned i = first; i < last; ++i) {
    if (fibers[i].kind != fibers[first].kind || !(fibers[i].waits_at == fibers[first].waits_at))
      return fail("a warp's threads take part in different operations: " + who(first) + ", " + who(i));
    bits |= static_cast<uint64_t>(fibers[i].value & 1) << (i - first);
  }
  for (unsigned i = first; i < last; ++i) {
    if (fibers[i].kind == Exchange::kBallot) {
      fibers[i].result = bits;
      continue;
    }
    const int source = fibers[i].source_lane;
    if (source < 0 || source >= static_cast<int>(last - first))
      return fail(who(i) + " takes the value of lane " + std::to_string(source) + ", which its warp does not have");
    fibers[i].result = fibers[first + source].value;
  }
  for (unsigned i = first; i < last; ++i) fibers[i].state = State::kReady;
}

void finish_barrier() {
  if (block->at_barrier < block->threads) return;
  for (unsigned i = 0; i < block->threads; ++i) {
    if (!(block->fibers[i].waits_at == block->fibers[0].waits_at))
      return fail("divergent barrier: " + who(0) + " and " + who(i) + " wait at different ones");
  }
  for (Fiber& fiber : block->fibers) fiber.state = State::kReady;
  block->at_barrier = 0;
}

// Nobody can go on and not all have left: says who waits for whom.
void fail_for_deadlock() {
  for (unsigned i = 0; i < block->threads; ++i) {
    const State state = block->fibers[i].state;
    if (state == State::kInExchange) {
      const unsigned first = i / DSP_EMU_WARP * DSP_EMU_WARP;
      for (unsigned k = first; k < std::min(first + DSP_EMU_WARP, block->threads); ++k) {
        if (block->fibers[k].state == State::kLeft)
          return fail(who(i) + " waits for its warp, of which thread " + std::to_string(k) + " has left the kernel");
        if (block->fibers[k].state == State::kAtBarrier)
          return fail(who(i) + " waits for its warp, of which " + who(k) + " waits at a barrier");
      }
    }
  }
  for (unsigned i = 0; i < block->threads; ++i) {
    if (block->fibers[i].state == State::kAtBarrier)
      return fail("divergent barrier: " + who(i) + " waits at one, and " + std::to_string(block->left) +
                  " of " + std::to_string(block->threads) + " threads have left the kernel");
  }
}

uint64_t next_random() {
  block->random = block->random * 6364136223846793005u + 1442695040888963407u;
  return block->random >> 33;
}

// Every thread that is ready, once each. Whether there was one.
bool run_all(const std::vector<unsigned>& order) {
  bool has_run = false;
  for (unsigned thread : order) {
    if (block->fibers[thread].state != State::kReady) continue;
    has_run = true;
    enter(thread);
    if (!block->error.empty()) break;
  }
  return has_run;
}

// One warp, taken at random, as far as it comes alone, its threads in random order: it gets ahead of the others by as much as
// barriers allow. Whether one was ready.
bool run_a_warp(std::vector<unsigned>& order) {
  for (unsigned i = block->threads - 1; i > 0; --i) std::swap(order[i], order[next_random() % (i + 1)]);
  for (unsigned first : order) {
    if (block->fibers[first].state != State::kReady) continue;
    std::vector<unsigned> warp;
    for (unsigned thread : order) {
      if (thread / DSP_EMU_WARP == first / DSP_EMU_WARP) warp.push_back(thread);
    }
    while (block->error.empty() && run_all(warp)) {
    }
    return true;
  }
  return false;
}

void run_block(std::vector<unsigned>& order, bool is_shuffled) {
  block->left = block->at_barrier = 0;
  for (unsigned i = 0; i < block->threads; ++i) {
    block->fibers[i].state = State::kReady;
    prepare(block->fibers[i].context, stack_of(i), run_fiber);
  }
  while (block->left < block->threads && block->error.empty()) {
    if (!(is_shuffled ? run_a_warp(order) : run_all(order))) fail_for_deadlock();
  }
}

const char* setting(const char* name) {
  const char* value = getenv(name);
  return value && *value ? value : nullptr;
}

}  // namespace

int64_t largest_grid() {
  const char* value = setting("DSP_EMU_GRID");
  return value ? atoll(value) : 0x7fffffff;
}

void* dynamic_shared() { return block->dynamic_shared; }
dim3 thread_index() { return dim3{block->current, 0, 0}; }
dim3 block_index() { return dim3{block->index, 0, 0}; }
dim3 block_size() { return dim3{block->threads, 1, 1}; }
dim3 grid_size() { return dim3{block->grid, 1, 1}; }
int own_lane() { return static_cast<int>(block->current % DSP_EMU_WARP); }

void barrier(Place here) {
  Fiber& fiber = block->fibers[block->current];
  fiber.state = State::kAtBarrier;
  fiber.waits_at = here;
  ++block->at_barrier;
  finish_barrier();
  leave(/*for_good=*/false);  // the last one to come too: after a barrier the first thread is the first again
}

uint64_t exchange(Exchange kind, uint64_t value, int lane, Place here) {
  Fiber& fiber = block->fibers[block->current];
  fiber.state = State::kInExchange;
  fiber.waits_at = here;
  fiber.kind = kind;
  fiber.value = value;
  fiber.source_lane = lane;
  finish_exchange(block->current);
  if (fiber.state != State::kReady) leave(/*for_good=*/false);
  return fiber.result;
}

int launch(int64_t blocks, int64_t threads, size_t shared_bytes, const std::function<void()>& body) {
  if (blocks < 1 || blocks > 0x7fffffff || threads < 1 || threads > kMostThreads) {
    fprintf(stderr, "emulator: no launch has %lld blocks of %lld threads\n", static_cast<long long>(blocks),
            static_cast<long long>(threads));
    return kLaunchFailure;
  }
  if (!stacks) {
    void* found = mmap(nullptr, kStackBytes * kMostThreads, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) return kLaunchFailure;
    stacks = static_cast<char*>(found);
  }
#if defined(__SANITIZE_ADDRESS__)
  // Fibers of a launch that failed never left their functions, whose frames still count as theirs.
  __asan_unpoison_memory_region(stacks, kStackBytes * kMostThreads);
#endif
  const char* seed = setting("DSP_EMU_SHUFFLE");
  Block own;
  own.threads = static_cast<unsigned>(threads);
  own.grid = static_cast<unsigned>(blocks);
  own.fibers.resize(own.threads);
  own.body = &body;
  own.random = seed ? strtoull(seed, nullptr, 10) * 2 + 1 : 0;
  std::vector<unsigned> order(own.threads);
  for (unsigned i = 0; i < own.threads; ++i) order[i] = i;
  // From the heap, and no more than asked for: the sanitizer guards its end.
  std::vector<unsigned char> shared;
  block = &own;
  const char* first = setting("DSP_EMU_FIRST");
  for (int64_t i = first ? atoll(first) : 0; i < blocks && own.error.empty(); ++i) {
    own.index = static_cast<unsigned>(i);
    if (shared_bytes) {
      shared.assign(shared_bytes, 0xa5);  // what a block finds there is nothing it may count on
      own.dynamic_shared = shared.data();
    }
    run_block(order, seed != nullptr);
  }
  block = nullptr;
  if (own.error.empty()) return 0;
  fprintf(stderr, "emulator: %s\n", own.error.c_str());
  return kLaunchFailure;
}

}  // namespace dsp_emu
