// Runs the parts of a decoding step: decode_parts.h.
//
// Each part has a counter of items that have been taken and one of those that are done. A thread takes items until
// there are none, waits until all are done, and goes on to the next part. Nobody waits for a thread that holds no item:
// one that comes late, or never, is not missed, so that it does not matter how many threads the region really has, and
// no order in which they run can make them wait for ever.
#include "decode_parts.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <thread>

#include "thread_memory.h"

namespace dalle_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Products of two numbers below which one more thread costs more than it saves.
constexpr int64_t kGrainProducts = 1 << 17;
// Looks at a counter, of some 40 cycles each, before a thread lets others have its core.
constexpr int kLooks = 1000;

struct alignas(64) Counter {
  std::atomic<int64_t> value{0};
};

struct Progress {
  Counter taken, done;
};

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void wait_for(const Counter& counter, int64_t value) {
  for (int look = 0; counter.value.load(std::memory_order_acquire) < value; ++look) {
    if (look < kLooks) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
}

// What a thread that starts runs keeps from one to the next, so that none allocates.
struct Run {
  std::vector<Part> parts;
  std::vector<Division> divisions;
  std::vector<std::vector<int32_t>> seen;  // these two by part, as many as were ever asked for
  std::unique_ptr<Progress[]> progress;
  ThreadMemory shared;

  void take(std::span<const Part> from) {
    const size_t count = from.size();
    parts.assign(from.begin(), from.end());
    divisions.resize(count);
    if (count > seen.size()) {
      seen.resize(count);
      progress = std::make_unique<Progress[]>(count);
    }
    for (size_t p = 0; p < count; ++p) {
      progress[p].taken.value.store(0, std::memory_order_relaxed);
      progress[p].done.value.store(0, std::memory_order_relaxed);
    }
  }

  // To be called by every thread.
  void work_off(PartMemory memory) {
    for (size_t p = 0; p < parts.size(); ++p) {
      Progress& at = progress[p];
      const int64_t items = divisions[p].items;
      std::visit(
          [&](const auto& part) {
            int64_t done = 0, item;
            while ((item = at.taken.value.fetch_add(1, std::memory_order_relaxed)) < items) {
              part.run(item, memory);
              ++done;
            }
            if (done > 0) at.done.value.fetch_add(done, std::memory_order_release);
          },
          parts[p]);
      wait_for(at.done, items);
    }
  }
};

}  // namespace

void run_parts(std::span<const Part> parts) {
  static thread_local Run run;
  run.take(parts);
  int64_t work = 0;
  for (size_t p = 0; p < parts.size(); ++p) {
    work += std::visit([&](auto& part) { return part.begin(run.seen[p]); }, run.parts[p]);
  }
  const int64_t wanted = std::clamp<int64_t>(work / kGrainProducts, 1, torch::stable::get_num_threads());
  int64_t threads = 1, own = 0, shared = 0;
  for (size_t p = 0; p < parts.size(); ++p) {
    const Division division = std::visit([&](auto& part) { return part.divide(wanted); }, run.parts[p]);
    run.divisions[p] = division;
    threads = std::max(threads, std::min(division.items, wanted));
    own = std::max(own, division.own);
    shared = std::max(shared, division.shared);
  }
  float* const common = run.shared.get(shared);
  Run* const started = &run;  // of this thread, also where another one works
  const auto work_off = [=](int64_t, int64_t) {
    static thread_local ThreadMemory memory;
    // Before it takes an item, so that none is lost where there is no memory.
    started->work_off({common, memory.get(own)});
  };
  if (threads == 1) {
    work_off(0, 1);
  } else {
    torch::stable::parallel_for(0, threads, 1, work_off);
  }
  for (const Part& part : run.parts) std::visit([](const auto& done) { done.end(); }, part);
}

Tensor plan_of(std::span<const Part> parts, const Tensor& like) {
  const size_t bytes = parts.size_bytes();
  Tensor plan = torch::stable::new_empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
  std::memcpy(plan.mutable_data_ptr(), static_cast<const void*>(parts.data()), bytes);
  return plan;
}

namespace {

void run_decode_plan(const Tensor plan, std::optional<Tensor> advance) {
  const auto bytes = static_cast<size_t>(plan.numel());
  const auto* parts = data_of<const Part>(plan, "plan", ScalarType::Byte, plan.numel());
  if (bytes % sizeof(Part) != 0) {
    throw std::runtime_error("plan must be plans of ops, one behind the other, got " + std::to_string(bytes) +
                             " bytes");
  }
  auto* position = advance.has_value() ? data_of<int64_t>(*advance, "advance", ScalarType::Long, 1) : nullptr;
  run_parts({parts, bytes / sizeof(Part)});
  if (position != nullptr) *position += 1;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dalle_fast, CPU, m) { m.impl("run_decode_plan_cpu", TORCH_BOX(&run_decode_plan)); }

}  // namespace dalle_fast
