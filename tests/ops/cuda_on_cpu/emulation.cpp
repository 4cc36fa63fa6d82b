#include "emulation.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <unordered_map>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {
namespace {

constexpr size_t kStack = 64 << 10;
constexpr unsigned kWarp = 32, kMostThreads = 1024, kMostBlocks = 8;
constexpr size_t kGranule = 2, kPage = 4096;

struct Block;

struct Fiber {
  ucontext_t context;
  Block* block;
  unsigned thread;
  // How often it came to a barrier, and how often it went on from one.
  unsigned shuffles = 0, came = 0, passed = 0, came_in_cluster = 0, passed_in_cluster = 0;
};

std::deque<Fiber*> ready;
Fiber* self = nullptr;  // none: the host runs
std::string failure;

void pause();

// Where fibers wait until all have come.
struct Barrier {
  unsigned members = 0, come = 0, phase = 0;
  std::vector<Fiber*> waiting;

  void arrive() {
    ++come;
    complete();
  }

  void leave() {
    --members;
    complete();
  }

  void wait(unsigned until) {
    while (phase < until) {
      waiting.push_back(self);
      pause();
    }
  }

  void complete() {
    if (come == 0 || come < members) return;
    come = 0;
    ++phase;
    ready.insert(ready.end(), waiting.begin(), waiting.end());
    waiting.clear();
  }
};

struct Warp {
  Barrier barrier;
  float values[2][kWarp];
};

struct Release {
  void operator()(char* bytes) const { operator delete[](bytes, std::align_val_t{16}); }
};

struct Memory {
  std::unique_ptr<char[], Release> bytes;
  size_t size;
};

struct Block {
  unsigned index, rank;
  Barrier barrier;
  std::vector<Warp> warps;
  std::map<const void*, Memory> memories;  // by key
  size_t bytes = 0;                        // of all of them
  unsigned reached = 0;  // barriers of the cluster that another block had come to when it reached in
};

struct Cluster {
  Barrier barrier;
  std::vector<Block> blocks;
};

Grid grid;
Cluster cluster;
ucontext_t host;
const std::function<void()>* body = nullptr;
std::map<const void*, size_t> allowed;  // shared memory of a launch, where that is more than 48 KB

// ---- who touched what

struct Touch {
  unsigned block = ~0u;
  uint16_t thread, came, came_in_cluster;
};

// Two bytes of memory. Two readers are enough: whoever writes is at most one of them.
struct Cell {
  Touch writer, readers[2];
  bool fresh = false;  // shared memory that nobody has written
};

std::unordered_map<uintptr_t, std::unique_ptr<std::array<Cell, kPage / kGranule>>> pages;

Cell& cell_of(uintptr_t address) {
  static uintptr_t number = ~uintptr_t{0};
  static std::array<Cell, kPage / kGranule>* found = nullptr;
  if (pages.empty() || number != address / kPage) {
    number = address / kPage;
    auto& page = pages[number];
    if (!page) page = std::make_unique<std::array<Cell, kPage / kGranule>>();
    found = page.get();
  }
  return (*found)[address % kPage / kGranule];
}

[[noreturn]] void fail(const std::string& message) {
  failure = message;
  pause();
  __builtin_unreachable();
}

bool before_now(const Touch& touch) {
  if (touch.block == ~0u) return true;
  const Block& block = *self->block;
  if (touch.block == block.index && touch.thread == self->thread) return true;
  if (touch.block / grid.cluster != block.index / grid.cluster) return false;
  const bool by_block = touch.block == block.index && touch.came < self->passed;
  const bool by_cluster = touch.came_in_cluster < self->passed_in_cluster;
  return (by_block && machine.forgotten != 'b') || (by_cluster && machine.forgotten != 'c');
}

void blame(const char* does, const Touch& other, const char* did) {
  const auto name = [](unsigned thread, unsigned block) {
    return "thread " + std::to_string(thread) + " of block " + std::to_string(block);
  };
  fail(name(self->thread, self->block->index) + " " + does + " what " +
       name(other.thread, other.block) + " " + did + ", with no barrier between them");
}

void touch(Cell& cell, bool writes) {
  const Touch now{self->block->index, static_cast<uint16_t>(self->thread),
                  static_cast<uint16_t>(self->came),
                  static_cast<uint16_t>(self->came_in_cluster)};
  if (!before_now(cell.writer)) blame(writes ? "writes" : "reads", cell.writer, "wrote");
  if (writes) {
    for (const Touch& reader : cell.readers)
      if (!before_now(reader)) blame("writes", reader, "read");
    cell.writer = now;
    cell.fresh = false;
    return;
  }
  if (cell.fresh) fail("shared memory is read before it is written");
  for (Touch& reader : cell.readers) {
    if (!before_now(reader)) continue;
    reader = now;
    return;
  }
  cell.readers[cell.readers[0].block != now.block] = now;
}

char* memory_of(Block& block, const void* key, size_t size) {
  Memory& memory = block.memories[key];
  if (memory.bytes) return memory.bytes.get();
  block.bytes += size;
  if (block.bytes > static_cast<size_t>(shared_room()))
    fail("a block has more shared memory than there is");
  memory.size = size;
  memory.bytes.reset(new (std::align_val_t{16}) char[size]);
  const auto begin = reinterpret_cast<uintptr_t>(memory.bytes.get());
  for (uintptr_t at = begin; at < begin + size; at += kGranule) (cell_of(at) = {}).fresh = true;
  return memory.bytes.get();
}

// ---- fibers

char* const stacks = static_cast<char*>(mmap(nullptr, kStack * kMostThreads * kMostBlocks,
                                             PROT_READ | PROT_WRITE,
                                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));

char* stack_of(const Fiber& fiber) {
  return stacks + kStack * (fiber.block->rank * kMostThreads + fiber.thread);
}

#ifdef __SANITIZE_ADDRESS__
const void* host_stack = nullptr;
size_t host_stack_size = 0;
#endif

void resume(Fiber* fiber) {
  self = fiber;
  threadIdx.x = fiber->thread;
  blockIdx.x = fiber->block->index;
#ifdef __SANITIZE_ADDRESS__
  void* frames = nullptr;
  __sanitizer_start_switch_fiber(&frames, stack_of(*fiber), kStack);
#endif
  swapcontext(&host, &fiber->context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(frames, nullptr, nullptr);
#endif
  self = nullptr;
}

void pause() {
  Fiber* const fiber = self;
#ifdef __SANITIZE_ADDRESS__
  void* frames = nullptr;
  __sanitizer_start_switch_fiber(&frames, host_stack, host_stack_size);
#endif
  swapcontext(&fiber->context, &host);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(frames, nullptr, nullptr);
#endif
}

void live() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_size);
#endif
  (*body)();
  self->block->warps[self->thread / kWarp].barrier.leave();
  self->block->barrier.leave();
  cluster.barrier.leave();
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(nullptr, host_stack, host_stack_size);
#endif
  setcontext(&host);
}

void prepare(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack_of(fiber);
  fiber.context.uc_stack.ss_size = kStack;
  makecontext(&fiber.context, live, 0);
}

// The blocks from `first` on, one cluster.
void run_cluster(unsigned first) {
  cluster = {};
  cluster.barrier.members = grid.cluster * grid.threads;
  cluster.blocks.resize(grid.cluster);
  std::vector<Fiber> fibers(grid.cluster * grid.threads);
  for (unsigned i = 0; i < fibers.size(); ++i) {
    Block& block = cluster.blocks[i / grid.threads];
    Fiber& fiber = fibers[i];
    block.rank = i / grid.threads;
    block.index = first + block.rank;
    block.barrier.members = grid.threads;
    block.warps.resize((grid.threads + kWarp - 1) / kWarp);
    fiber.block = &block;
    fiber.thread = i % grid.threads;
    ++block.warps[fiber.thread / kWarp].barrier.members;
    prepare(fiber);
    ready.push_back(&fiber);
  }
  if (machine.backwards) std::reverse(ready.begin(), ready.end());
  while (!ready.empty() && failure.empty()) {
    Fiber* const next = ready.front();
    ready.pop_front();
    resume(next);
  }
  if (failure.empty() && cluster.barrier.members > 0)
    failure = std::to_string(cluster.barrier.members) + " threads wait for others for ever";
  for (const Block& block : cluster.blocks)
    if (failure.empty() && block.reached > 0 && block.reached >= cluster.barrier.phase)
      failure = "a block may have ended when another reaches into its memory";
}

}  // namespace

int shared_room() { return (machine.capability < 9 ? 163 : 227) << 10; }

bool allow_shared(const void* kernel, int bytes) {
  if (bytes > shared_room()) {
    failure = "a kernel may be allowed " + std::to_string(shared_room()) + " bytes at most";
    return false;
  }
  allowed[kernel] = bytes;
  return true;
}

bool run(const void* kernel, const Grid& wanted, const std::function<void()>& given) {
  failure.clear();
  if (wanted.threads == 0 || wanted.threads > kMostThreads)
    failure = "a block cannot have " + std::to_string(wanted.threads) + " threads";
  else if (wanted.cluster > (machine.capability < 9 ? 1 : kMostBlocks))
    failure = "a cluster cannot have " + std::to_string(wanted.cluster) + " blocks";
  else if (wanted.blocks == 0 || wanted.blocks % wanted.cluster != 0)
    failure = std::to_string(wanted.blocks) + " blocks are no whole clusters";
  else if (wanted.shared_bytes > std::max<size_t>(48 << 10, allowed[kernel]))
    failure = "a launch asks for more shared memory than its kernel is allowed";
  if (!failure.empty()) return false;

  grid = wanted;
  body = &given;
  blockDim.x = grid.threads;
  ready.clear();
  pages.clear();
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(stacks, kStack * kMostThreads * grid.cluster);
#endif
  const unsigned clusters = grid.blocks / grid.cluster;
  for (unsigned i = 0; i < clusters && failure.empty(); ++i)
    run_cluster(grid.cluster * (machine.backwards ? clusters - 1 - i : i));
  cluster = {};
  return failure.empty();
}

const char* error() { return failure.c_str(); }

void* shared_memory(const void* key, size_t size) { return memory_of(*self->block, key, size); }

void* shared_of_launch() { return shared_memory(nullptr, grid.shared_bytes); }

void* in_block(void* own, int rank) {
  if (self->passed_in_cluster == 0) fail("another block is reached before it has surely begun");
  Block& other = cluster.blocks[rank];
  if (&other != self->block) other.reached = std::max(other.reached, self->came_in_cluster);
  for (const auto& [key, memory] : self->block->memories) {
    const ptrdiff_t offset = static_cast<char*>(own) - memory.bytes.get();
    if (offset < 0 || offset >= static_cast<ptrdiff_t>(memory.size)) continue;
    return memory_of(other, key, memory.size) + offset;
  }
  fail("what is to be reached in another block is not in shared memory");
}

void wait_for_block() {
  ++self->came;
  self->block->barrier.arrive();
  self->block->barrier.wait(self->came);
  ++self->passed;
}

void arrive_at_cluster() {
  ++self->came_in_cluster;
  cluster.barrier.arrive();
}

void wait_for_cluster() {
  cluster.barrier.wait(self->came_in_cluster);
  ++self->passed_in_cluster;
}

int rank_in_cluster() { return static_cast<int>(self->block->rank); }

float shuffle(float value, int distance) {
  Warp& warp = self->block->warps[self->thread / kWarp];
  if (warp.barrier.members < kWarp) fail("a shuffle of a warp that has lost threads");
  float(&values)[kWarp] = warp.values[self->shuffles % 2];
  values[self->thread % kWarp] = value;
  warp.barrier.arrive();
  warp.barrier.wait(++self->shuffles);
  return values[(self->thread % kWarp) ^ distance];
}

}  // namespace emulation

// ---- what the tests call

#pragma GCC visibility push(default)
extern "C" {
void set_machine(int capability, bool backwards, char forgotten) {
  emulation::machine = {capability, backwards, forgotten};
}
unsigned blocks_of_last_launch() { return emulation::grid.blocks; }
}
#pragma GCC visibility pop

// ---- what -fsanitize=thread calls

static void touch_all(const void* memory, size_t size, bool writes) {
  using namespace emulation;
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  const auto own = reinterpret_cast<uintptr_t>(stacks);
  if (!self || begin - own < kStack * kMostThreads * kMostBlocks) return;
  for (uintptr_t at = begin / kGranule * kGranule; at < begin + size; at += kGranule)
    touch(cell_of(at), writes);
}

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_read_range(void* memory, size_t size) { touch_all(memory, size, false); }
void __tsan_write_range(void* memory, size_t size) { touch_all(memory, size, true); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
int __tsan_atomic32_fetch_add(volatile int* value, int more, int) {
  return __atomic_fetch_add(value, more, __ATOMIC_SEQ_CST);
}
#define ACCESSES(size)                                                               \
  void __tsan_read##size(void* memory) { touch_all(memory, size, false); }           \
  void __tsan_write##size(void* memory) { touch_all(memory, size, true); }           \
  void __tsan_unaligned_read##size(void* memory) { touch_all(memory, size, false); } \
  void __tsan_unaligned_write##size(void* memory) { touch_all(memory, size, true); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
}
