// Memory for what kernels write.
#pragma once

#include <ATen/ATen.h>

#include <sys/mman.h>

#include <map>
#include <mutex>
#include <vector>

namespace qat {

using at::Tensor;

// Blocks by size, used again from step to step. In glibc's heap a freed place does not take an aligned tensor of the
// same size again, so most of a training step's heap would be holes; what it gives back it gets again page by page.
class Pool {
 public:
  static constexpr size_t SMALLEST = 1 << 16;  // bytes; smaller tensors find room in the heap
  static constexpr int PATIENCE = 64;          // after so many new blocks, sizes that none of them took are given back

  Tensor empty(at::IntArrayRef shape, at::IntArrayRef stride, at::ScalarType dtype) {
    size_t size = c10::elementSize(dtype);
    for (int64_t extent : shape) size *= extent;
    if (size < SMALLEST) return at::empty_strided(shape, stride, dtype);
    size_t bits = 64 - __builtin_clzll(size), unit = size_t(1) << (bits - 4);
    size = (size + unit - 1) / unit * unit;  // sizes of one power of two share eight sizes of blocks
    void* block = take(size);
    return at::from_blob(block, shape, stride, [this, size](void* b) { give(b, size); }, at::TensorOptions(dtype));
  }

  std::vector<int64_t> free() {
    std::lock_guard<std::mutex> lock(mutex_);
    std::vector<int64_t> sizes;
    for (auto& [size, blocks] : blocks_) sizes.insert(sizes.end(), blocks.free.size(), size);
    return sizes;
  }

  void clear() {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [size, blocks] : blocks_) drop(size, blocks);
  }

 private:
  struct Blocks {
    std::vector<void*> free;  // the latest last: it may be in the cache still
    bool used = false;
  };

  void* take(size_t size) {
    std::lock_guard<std::mutex> lock(mutex_);
    Blocks& blocks = blocks_[size];
    blocks.used = true;
    if (!blocks.free.empty()) {
      void* block = blocks.free.back();
      blocks.free.pop_back();
      return block;
    }
    if (++made_ % PATIENCE == 0) {
      for (auto& [other, others] : blocks_) {
        if (!others.used) drop(other, others);
        others.used = false;
      }
    }
    void* block = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK_WITH(OutOfMemoryError, block != MAP_FAILED, "not enough memory: a tensor of ", size, " bytes");
    return block;
  }

  void give(void* block, size_t size) {
    std::lock_guard<std::mutex> lock(mutex_);
    blocks_[size].free.push_back(block);
  }

  static void drop(size_t size, Blocks& blocks) {
    for (void* block : blocks.free) munmap(block, size);
    blocks.free.clear();
  }

  std::mutex mutex_;
  std::map<size_t, Blocks> blocks_;
  int made_ = 0;
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
