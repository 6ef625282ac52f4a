// See simt.h.
#include "simt.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdio>
#include <unordered_map>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace {

constexpr size_t kStack = 64 * 1024;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStack);
  bool done;
};

std::vector<Fiber> fibers(1024);
ucontext_t scheduler;
size_t current;
const std::function<void()>* body;
bool reversed = false;
sigjmp_buf escape;
char message[200];

void start() {
  (*body)();
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &scheduler);
}

[[noreturn]] void fail(const char* what) {
  snprintf(message, sizeof message, "%s: block (%u, %u, %u), thread (%u, %u, %u)", what, blockIdx.x,
           blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
  siglongjmp(escape, 1);
}

void on_fault(int) { fail("memory out of bounds"); }

void run_block(size_t threads) {
  for (size_t t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start, 0);
  }
  for (size_t running = threads; running > 0;) {
    size_t finished = 0;
    for (size_t i = 0; i < threads; ++i) {
      current = reversed ? threads - 1 - i : i;
      const auto at = static_cast<unsigned>(current);
      threadIdx = {at % blockDim.x, at / blockDim.x % blockDim.y, at / blockDim.x / blockDim.y};
      swapcontext(&scheduler, &fibers[current].context);
      finished += fibers[current].done;
    }
    if (finished != 0 && finished != threads) fail("a barrier that not all threads reach");
    running -= finished;
  }
}

}  // namespace

void __syncthreads() {
  const uint3 own = threadIdx;
  swapcontext(&fibers[current].context, &scheduler);
  threadIdx = own;
}

void __trap() { fail("trap"); }

const char* sacl::cuda::run_grid(dim3 grid, dim3 block, const std::function<void()>& thread) {
  const size_t threads = size_t{block.x} * block.y * block.z;
  const bool fits = grid.x && grid.y && grid.z && grid.y < 65536 && grid.z < 65536 && threads > 0 &&
                    threads <= 1024 && block.z <= 64;
  if (!fits) return "invalid configuration argument";
  struct sigaction fault = {}, before;
  fault.sa_handler = on_fault;
  fault.sa_flags = SA_NODEFER;
  sigaction(SIGSEGV, &fault, &before);
  body = &thread;
  blockDim = block;
  gridDim = grid;
  const char* failure = nullptr;
  if (sigsetjmp(escape, 1) == 0) {
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          blockIdx = {x, y, z};
          run_block(threads);
        }
  } else {
    failure = message;
  }
  sigaction(SIGSEGV, &before, nullptr);
  return failure;
}

extern "C" {

__attribute__((visibility("default"))) void sacl_simt_reverse(int reverse) { reversed = reverse; }

__attribute__((visibility("default"))) void* sacl_simt_allocate(size_t bytes);
__attribute__((visibility("default"))) void sacl_simt_free(void* data);

const char* sacl_cuda_use_device(int) { return nullptr; }
}

namespace {
struct Region {
  char* start;
  size_t size;
};
std::unordered_map<void*, Region> regions;
}  // namespace

// The data ends, but for what rounds it up to 16 bytes, where a page that is not there begins.
void* sacl_simt_allocate(size_t bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), held = (bytes + 15) / 16 * 16;
  const size_t pages = (held + page - 1) / page;
  const size_t size = (pages + 2) * page;
  void* mapped = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* start = static_cast<char*>(mapped);
  std::memset(start, 0xff, size);
  mprotect(start, page, PROT_NONE);
  mprotect(start + size - page, page, PROT_NONE);
  void* data = start + size - page - held;
  regions[data] = {start, size};
  return data;
}

void sacl_simt_free(void* data) {
  const Region region = regions.at(data);
  regions.erase(data);
  munmap(region.start, region.size);
}
