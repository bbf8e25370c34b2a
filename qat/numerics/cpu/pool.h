// Memory for what kernels write.
#pragma once

#include <ATen/ATen.h>

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <set>
#include <vector>

namespace qat {

using at::Tensor;

// Places in memory of our own, used again from step to step: a tensor takes the smallest free place that it fits in, and
// neighbours that are free are one place. In glibc's heap a freed place does not take an aligned tensor of the same size
// again, so most of a training step's heap would be holes; what it gives back it gets again page by page.
class Pool {
 public:
  static constexpr size_t SMALLEST = 1 << 16;  // bytes; smaller tensors find room in the heap
  static constexpr size_t CHUNK = 1 << 25;     // asked of the system at once: what is not written to is not there yet

  Tensor empty(at::IntArrayRef shape, at::IntArrayRef stride, at::ScalarType dtype) {
    static const size_t page = sysconf(_SC_PAGESIZE);
    size_t size = c10::elementSize(dtype);
    for (int64_t extent : shape) size *= extent;
    if (size < SMALLEST) return at::empty_strided(shape, stride, dtype);
    size = (size + page - 1) / page * page;
    char* place = take(size);
    auto give_back = [this, size](void* p) { give(static_cast<char*>(p), size); };
    return at::from_blob(place, shape, stride, give_back, at::TensorOptions(dtype));
  }

  // Sizes of the free places, from small to large.
  std::vector<int64_t> free() {
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<int64_t> sizes;
    for (const auto& [size, place] : by_size_) sizes.push_back(size);
    return sizes;
  }

  void clear() {
    std::lock_guard<std::mutex> lock(mutex_);
    unmap();
  }

 private:
  using Places = std::map<char*, size_t>;

  char* take(size_t size) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = by_size_.lower_bound({size, nullptr});
    if (found == by_size_.end()) {
      grow(size);
      found = by_size_.lower_bound({size, nullptr});
    }
    auto [room, place] = *found;
    leave(by_place_.find(place));
    if (room > size) enter(place, room - size);
    used_ += size;
    return place + room - size;  // from its end: systems put newer chunks below older ones
  }

  void give(char* place, size_t size) {
    std::lock_guard<std::mutex> lock(mutex_);
    used_ -= size;
    join(place, size);
  }

  // Places that did not fit are kept if they are less than what is in use: sizes may have changed for good.
  void grow(size_t size) {
    if (free_ > used_) unmap();
    size = std::max(size, CHUNK);
    void* chunk = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK_WITH(OutOfMemoryError, chunk != MAP_FAILED, "not enough memory: ", size, " bytes");
    join(static_cast<char*>(chunk), size);
  }

  void join(char* place, size_t size) {
    auto next = by_place_.lower_bound(place);
    if (next != by_place_.end() && place + size == next->first) {
      size += next->second;
      next = leave(next);
    }
    if (next != by_place_.begin()) {
      auto before = std::prev(next);
      if (before->first + before->second == place) {
        place = before->first, size += before->second;
        leave(before);
      }
    }
    enter(place, size);
  }

  void enter(char* place, size_t size) {
    by_place_[place] = size;
    by_size_.insert({size, place});
    free_ += size;
  }

  Places::iterator leave(Places::iterator at) {
    free_ -= at->second;
    by_size_.erase({at->second, at->first});
    return by_place_.erase(at);
  }

  void unmap() {
    for (const auto& [place, size] : by_place_) munmap(place, size);
    by_place_.clear(), by_size_.clear(), free_ = 0;
  }

  std::mutex mutex_;
  Places by_place_;                             // where -> size, of what is free
  std::set<std::pair<size_t, char*>> by_size_;  // the same
  size_t used_ = 0, free_ = 0;
};

inline Pool& pool() {
  static Pool* one = new Pool;  // never destroyed: tensors may outlive every static object
  return *one;
}

inline Tensor empty_like(const Tensor& x, at::ScalarType dtype) { return pool().empty(x.sizes(), x.strides(), dtype); }

// A tensor in the pool, without gaps; no view, so that what it is given to may write to it.
inline Tensor room(at::IntArrayRef shape, at::ScalarType dtype) {
  return pool().empty(shape, c10::contiguous_strides(shape), dtype);
}

}  // namespace qat
