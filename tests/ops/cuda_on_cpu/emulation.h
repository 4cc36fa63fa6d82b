// A CUDA device on the CPU, for tests: the threads of a grid are fibers of one thread, and a kernel
// calls what is declared here.
//
// The blocks of a cluster run together, clusters one after another. A fiber runs until it has to
// wait for others, so that whatever happens, happens again. What is compiled with -fsanitize=thread
// tells emulation.cpp of each load and store; it finds those of two threads that no barrier puts in
// order.
#pragma once

#include <cstddef>
#include <functional>

namespace emulation {

struct Machine {
  int capability = 9;      // 8 is an A100, 9 an H100
  bool backwards = false;  // the last thread of the last block begins
  char forgotten = 0;      // barriers of blocks (b) or clusters (c) put nothing in order
};
inline Machine machine;

int shared_room();  // bytes a block may have

struct Grid {
  unsigned blocks, threads, cluster = 1;
  size_t shared_bytes = 0;
};

// Run `body` once for each thread; `kernel` is its name. False where that went wrong.
bool run(const void* kernel, const Grid& grid, const std::function<void()>& body);
bool allow_shared(const void* kernel, int bytes);  // to a launch
const char* error();  // what went wrong last

// ---- what the threads call

struct Index {
  unsigned x = 0;
};
inline Index threadIdx, blockIdx, blockDim;  // of the thread that runs

// Memory of the block: one for each key, and for null that of the launch.
void* shared_memory(const void* key, size_t bytes);
void* shared_of_launch();
void* in_block(void* own, int rank);  // the same place in another block of the cluster

void wait_for_block();
int rank_in_cluster();
void arrive_at_cluster();
void wait_for_cluster();
float shuffle(float value, int distance);

}  // namespace emulation
