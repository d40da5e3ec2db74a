// Work given out to torch's threads piece by piece, where equal shares would take unequal times.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "../common/torch_stable.h"

namespace dalle_fast {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Numbers to be worked off by all threads, whoever is free next.
class WorkQueue {
 public:
  explicit WorkQueue(int64_t size) : size_(size) {}

  // The next number, or -1.
  int64_t next() {
    const int64_t item = next_.fetch_add(1, std::memory_order_relaxed);
    return item < size_ ? item : -1;
  }

 private:
  const int64_t size_;
  std::atomic<int64_t> next_{0};
};

// Calls call(begin, end) for parts of 0..count-1, on all threads, or as many as are asked for, whoever is free next.
template <class Call>
void work_off(int64_t count, Call call, int64_t most_threads = INT64_MAX) {
  WorkQueue queue(count);
  const int64_t threads = std::min({static_cast<int64_t>(torch::stable::get_num_threads()), count, most_threads});
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t item = queue.next(); item >= 0; item = queue.next()) call(item, item + 1);
  });
}

}  // namespace dalle_fast
