#pragma once

#include <cstdint>
#include <iosfwd>
#include <vector>

#include <ATen/core/Tensor.h>

namespace fused_lars {

// The name of a tensor in messages: the op's argument, and the index if that is a list, as in grads[3].
struct Name {
  const char* argument;
  int64_t index = -1;
};
std::ostream& operator<<(std::ostream& out, const Name& name);

// The address of the first element. It is 0 for a tensor without elements, and for a meta tensor, a fake
// tensor or one that torch.func wraps, which have no memory.
uintptr_t address_of(const at::Tensor& tensor);

// Finds two tensors of a step that share memory, at least one of which is written. Two threads would write
// that memory at once, or one would read what the other has written.
class SharedMemoryCheck {
 public:
  explicit SharedMemoryCheck(size_t most_tensors);

  // Skips undefined tensors and those without memory. Throws InvalidTensor if the same tensor was added
  // before. Keeps a pointer to `tensor`.
  void add(const Name& name, const at::Tensor& tensor, bool written);

  // Throws InvalidTensor that names two tensors if they share memory. Takes O(n log n) for n tensors, and
  // time for each pair whose ranges of addresses overlap. Such a pair need not share memory: two columns of a
  // matrix do not.
  void run();

 private:
  struct Entry {
    Name name;
    const at::Tensor* tensor;
    uintptr_t begin;
    bool written;
  };
  struct Range {
    uintptr_t begin, end;
    uint32_t entry;
  };

  [[noreturn]] void fail(uint32_t earlier, uint32_t later) const;
  uint32_t& slot_of(uintptr_t begin);

  std::vector<Entry> entries_;
  // In training, most tensors have a storage that nothing else refers to. Such a tensor can share memory only
  // with itself. A hash table finds that in a fraction of the time that sorting takes. A slot holds the index
  // of an entry, plus 1; 0 is empty.
  std::vector<uint32_t> owners_;
  std::vector<Range> ranges_;  // of the other tensors
};

// Whether an element of `a` and an element of `b` share a byte. Their first elements are at the given
// addresses. Returns false if the search takes too long, which can happen with views made by as_strided.
bool share_an_element(const at::Tensor& a, uintptr_t a_begin, const at::Tensor& b, uintptr_t b_begin);

}  // namespace fused_lars
