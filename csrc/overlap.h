#pragma once

#include <cstdint>
#include <iosfwd>
#include <vector>

#include <ATen/core/Tensor.h>

namespace fused_lars {

// Names a tensor in a message, by the op's argument and, where that is a list, the place in it: grads[3].
struct Name {
  const char* argument;
  int64_t index = -1;
};
std::ostream& operator<<(std::ostream& out, const Name& name);

// Of the first element; 0 where there is none, and for meta and fake tensors and those of torch.func, which
// have no memory.
uintptr_t address_of(const at::Tensor& tensor);

// Finds tensors that share memory, of which one at least is written: two threads would write it at once, or
// one read what another has written.
class SharedMemoryCheck {
 public:
  explicit SharedMemoryCheck(size_t most_tensors);

  // Undefined tensors and those without memory share none. Throws InvalidTensor where the tensor itself came
  // before. Keeps a pointer to it.
  void add(const Name& name, const at::Tensor& tensor, bool written);

  // Throws InvalidTensor that names two of the tensors. O(n log n), unless there are slices of one tensor:
  // all pairs whose ranges of addresses overlap are looked at, since columns of a matrix share none of it.
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
  // In training most tensors have a storage that nobody else refers to. They can only be there twice, which a
  // hash table finds in a fraction of the time that sorting takes. Slots hold an entry + 1.
  std::vector<uint32_t> owners_;
  std::vector<Range> ranges_;  // of the others
};

// Whether an element of `a` and one of `b` share a byte; their first elements are at these addresses. False
// where it would take long to tell, as it may for views made by as_strided.
bool share_an_element(const at::Tensor& a, uintptr_t a_begin, const at::Tensor& b, uintptr_t b_begin);

}  // namespace fused_lars
