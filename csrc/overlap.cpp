#include "overlap.h"

#include <algorithm>
#include <bit>
#include <ostream>

#include "fused_lars/errors.h"

namespace fused_lars {

std::ostream& operator<<(std::ostream& out, const Name& name) {
  out << name.argument;
  return name.index < 0 ? out : out << '[' << name.index << ']';
}

uintptr_t address_of(const at::Tensor& tensor) {
  const auto* impl = tensor.unsafeGetTensorImpl();
  // On MPS the pointer is a handle and no address.
  if (!impl->has_storage() || tensor.device().is_mps()) return 0;
  auto* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  const auto base = reinterpret_cast<uintptr_t>(storage->_mutable_data_ptr_no_checks().get());
  // A traced tensor may have a pointer that is not its own, and sizes that are symbols.
  const auto numel = tensor.sym_numel().maybe_as_int();
  const auto offset = tensor.sym_storage_offset().maybe_as_int();
  if (base == 0 || !numel || *numel == 0 || !offset) return 0;
  return base + *offset * tensor.itemsize();
}

namespace {

// Whether no other tensor can use this one's memory. Then nothing else refers to the storage, and the memory
// is torch's own: memory from elsewhere (NumPy, a mapped file) can be in two storages.
bool owns_its_memory(const at::Tensor& tensor) {
  const auto& storage = tensor.unsafeGetTensorImpl()->unsafe_storage();
  const auto& data = storage.unsafeGetStorageImpl()->_mutable_data_ptr_no_checks();
  return storage.use_count() == 1 && data.get_context() == data.get();
}

int64_t bytes_spanned(const at::Tensor& tensor) {
  if (tensor.is_non_overlapping_and_dense()) return static_cast<int64_t>(tensor.nbytes());
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  return (last + 1) * static_cast<int64_t>(tensor.itemsize());
}

// An offset of stride * k bytes, for any k from low to high.
struct Term {
  int64_t stride, low, high;
};

// Whether a sum that takes one offset from each term can lie between two bounds. Terms are searched from the
// largest stride to the smallest. What the smaller ones can still add is little then, so few values of k have
// to be tried.
class SumInBounds {
 public:
  SumInBounds(std::vector<Term> terms, int64_t above, int64_t below)
      : terms_(std::move(terms)), above_(above), below_(below) {
    std::sort(terms_.begin(), terms_.end(), [](const Term& a, const Term& b) { return a.stride > b.stride; });
    // Terms of equal stride are merged. Without that, a square matrix would be searched element by element.
    size_t kept = 0;
    for (const auto& term : terms_) {
      if (kept > 0 && terms_[kept - 1].stride == term.stride) {
        terms_[kept - 1].low += term.low;
        terms_[kept - 1].high += term.high;
      } else {
        terms_[kept++] = term;
      }
    }
    terms_.resize(kept);
    rest_.resize(kept + 1);
    for (size_t i = kept; i-- > 0;) {
      rest_[i] = {rest_[i + 1].low + terms_[i].stride * terms_[i].low,
                  rest_[i + 1].high + terms_[i].stride * terms_[i].high};
    }
  }

  bool exists(int64_t sum = 0, size_t i = 0) {
    if (sum + rest_[i].high <= above_ || sum + rest_[i].low >= below_ || --budget_ < 0) return false;
    if (i == terms_.size()) return true;
    const auto& [stride, low, high] = terms_[i];
    const auto& rest = rest_[i + 1];
    const int64_t first = std::max(low, floor_div(above_ - rest.high - sum, stride));
    const int64_t last = std::min(high, floor_div(below_ - rest.low - sum, stride));
    for (int64_t k = first; k <= last; ++k) {
      if (exists(sum + stride * k, i + 1)) return true;
    }
    return false;
  }

 private:
  struct Interval {
    int64_t low = 0, high = 0;
  };

  static int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

  std::vector<Term> terms_;
  std::vector<Interval> rest_;  // rest_[i]: what the terms from i on can add
  int64_t above_, below_;
  int budget_ = 10000;  // sums still to be tried; a microsecond is enough for hundreds
};

}  // namespace

bool share_an_element(const at::Tensor& a, uintptr_t a_begin, const at::Tensor& b, uintptr_t b_begin) {
  std::vector<Term> terms;
  const auto add = [&terms](const at::Tensor& tensor, int64_t sign) {
    const auto itemsize = static_cast<int64_t>(tensor.itemsize());
    const auto add_term = [&](int64_t size, int64_t stride) {
      const int64_t last = sign * (size - 1);
      if (last != 0 && stride != 0) {
        terms.push_back({stride * itemsize, std::min<int64_t>(last, 0), std::max<int64_t>(last, 0)});
      }
    };
    if (tensor.is_non_overlapping_and_dense()) return add_term(tensor.numel(), 1);
    for (int64_t d = 0; d < tensor.dim(); ++d) add_term(tensor.size(d), tensor.stride(d));
  };
  add(a, 1);
  add(b, -1);
  // The address of an element of `a` minus that of an element of `b` is this distance plus a sum of offsets.
  const auto distance = static_cast<int64_t>(a_begin - b_begin);
  return SumInBounds(std::move(terms), -static_cast<int64_t>(a.itemsize()), b.itemsize()).exists(distance);
}

SharedMemoryCheck::SharedMemoryCheck(size_t most_tensors) : owners_(std::bit_ceil(2 * most_tensors + 1)) {
  entries_.reserve(most_tensors);
}

uint32_t& SharedMemoryCheck::slot_of(uintptr_t begin) {
  const size_t mask = owners_.size() - 1;
  for (size_t i = (begin * 0x9E3779B97F4A7C15u) >> 32;; ++i) {
    auto& slot = owners_[i & mask];
    if (slot == 0 || entries_[slot - 1].begin == begin) return slot;
  }
}

void SharedMemoryCheck::add(const Name& name, const at::Tensor& tensor, bool written) {
  if (!tensor.defined()) return;
  const uintptr_t begin = address_of(tensor);
  if (begin == 0) return;
  const auto entry = static_cast<uint32_t>(entries_.size());
  entries_.push_back({name, &tensor, begin, written});
  if (!owns_its_memory(tensor)) {
    ranges_.push_back({begin, begin + bytes_spanned(tensor), entry});
    return;
  }
  auto& slot = slot_of(begin);
  if (slot == 0) {
    slot = entry + 1;
  } else if (written || entries_[slot - 1].written) {
    fail(slot - 1, entry);
  }
}

void SharedMemoryCheck::run() {
  std::sort(ranges_.begin(), ranges_.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (auto range = ranges_.begin(); range != ranges_.end(); ++range) {
    for (auto next = range + 1; next != ranges_.end() && next->begin < range->end; ++next) {
      const auto &one = entries_[range->entry], &other = entries_[next->entry];
      if ((one.written || other.written) &&
          share_an_element(*one.tensor, one.begin, *other.tensor, other.begin)) {
        fail(std::min(range->entry, next->entry), std::max(range->entry, next->entry));
      }
    }
  }
}

void SharedMemoryCheck::fail(uint32_t earlier, uint32_t later) const {
  FUSED_LARS_CHECK(false, InvalidTensor, entries_[later].name, " shares memory with ", entries_[earlier].name,
                   "; every tensor that a step writes needs memory of its own");
}

}  // namespace fused_lars
