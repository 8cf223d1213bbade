#include "gpu.h"

#include <memory>
#include <numeric>
#include <random>

// Saves the caller's registers and stack, and goes on where `to` was saved. (x86-64, System V.)
extern "C" void gpu_switch(void** from, void* to);
asm(R"(
.globl gpu_switch
gpu_switch:
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
)");

namespace gpu {

Thread* current = nullptr;
int64_t progress = 0;
unsigned schedule = 0;

namespace {

constexpr size_t kStack = 128 << 10;  // of a thread
void* scheduler = nullptr;
const std::function<void()>* running = nullptr;

void run() {
  Thread* const thread = current;
  (*running)();
  thread->ended = true, progress++;
  for (;;) yield();
}

// A stack that looks as if `run` had just been called and had switched away at once.
void prepare(Thread& thread, char* stack) {
  void** top = reinterpret_cast<void**>(stack + kStack - 64);
  *--top = nullptr;  // aligns what follows as a call does
  *--top = reinterpret_cast<void*>(run);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  thread.stack_pointer = top;
}

}  // namespace

void yield() { gpu_switch(&current->stack_pointer, scheduler); }

void named_barrier(int id, int threads, bool waits) {
  NamedBarrier& barrier = current->block->named[id];
  const int phase = barrier.phase;
  if (++barrier.arrived > threads) fail("more arrivals at a named barrier than it is for");
  if (barrier.arrived == threads)
    barrier.arrived = 0, barrier.phase++, progress++;
  else if (waits)
    while (barrier.phase == phase) yield();
}

void launch(dim3 grid, dim3 threads, size_t bytes, int cluster_size, const std::function<void()>& kernel) {
  running = &kernel;
  const size_t count = size_t(cluster_size) * threads.x;
  std::unique_ptr<char[]> stacks(new char[count * kStack]);
  bytes = std::max<size_t>(bytes, 16);
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x += cluster_size) {
        Cluster cluster;
        std::vector<std::unique_ptr<Block>> blocks;
        std::vector<Thread> all(count);
        for (int rank = 0; rank < cluster_size; rank++) {
          blocks.push_back(std::make_unique<Block>());
          Block& block = *blocks.back();
          block.index = dim3(x + rank, y, z), block.threads = threads, block.rank = rank, block.cluster = &cluster;
          block.shared = static_cast<char*>(std::aligned_alloc(1024, (bytes + 1023) / 1024 * 1024));
          block.bytes = bytes;
          std::memset(block.shared, 0xff, bytes);
          block.warps.resize((threads.x + kWarp - 1) / kWarp);
          cluster.blocks.push_back(&block);
          for (unsigned i = 0; i < threads.x; i++) {
            Thread& thread = all[rank * threads.x + i];
            thread.index = dim3(i, 0, 0), thread.lane = i % kWarp, thread.warp = i / kWarp, thread.block = &block;
            prepare(thread, &stacks[(rank * threads.x + i) * kStack]);
          }
        }
        std::vector<size_t> warps(count / kWarp);
        std::iota(warps.begin(), warps.end(), 0);
        std::minstd_rand random(schedule);
        for (size_t left = count, idle = 0; left > 0;) {
          const int64_t before = progress;
          left = 0;
          if (schedule) std::shuffle(warps.begin(), warps.end(), random);
          for (const size_t warp : warps) {
            const bool waits = schedule && random() % 2;
            for (size_t i = warp * kWarp; i < (warp + 1) * kWarp; i++) {
              if (!waits && !all[i].ended) {
                current = &all[i];
                gpu_switch(&scheduler, current->stack_pointer);
              }
              left += !all[i].ended;
            }
          }
          idle = progress == before ? idle + 1 : 0;
          if (idle > (schedule ? 100 : 3) && left > 0) fail("threads that wait for ever");
        }
        for (const auto& block : blocks) std::free(block->shared);
      }
}

}  // namespace gpu
