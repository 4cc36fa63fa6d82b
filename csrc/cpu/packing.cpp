// Best fit decreasing on the histogram of lengths: groups of equal bins move at once, so that
// millions of examples take some ten thousand steps. The result has exactly as many packs as best
// fit decreasing item by item: an item goes to the fullest bin that holds it, and since that bin is
// then fuller still, one bin takes floor(room / length) items of a length before the next is touched.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// SplitMix64: the same numbers on every machine and with every standard library.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  // Uniform in [0, bound), bound < 2^32.
  uint64_t below(uint64_t bound) {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return ((z ^ (z >> 31)) >> 32) * bound >> 32;
  }

  template <typename T>
  void shuffle(T* first, uint64_t count) {
    for (uint64_t i = count; i > 1; --i) std::swap(first[i - 1], first[below(i)]);
  }

 private:
  uint64_t state_;
};

// Bins of equal content: those of `parent` with `copies` items of `length` put into each.
struct Pattern {
  int64_t parent;
  int64_t length;
  int64_t copies;
};

struct Group {
  int64_t pattern;
  int64_t bins;
};

struct Packing {
  std::vector<Pattern> patterns;
  std::vector<Group> groups;
};

class BestFit {
 public:
  explicit BestFit(int64_t capacity) : capacity_(capacity) {}

  // Put `count` items of `length` away; lengths must come in decreasing order.
  void place(int64_t length, int64_t count) {
    for (auto room = open_.lower_bound(length); count > 0 && room != open_.end();
         room = open_.lower_bound(length)) {
      count -= fill(room, length, count);
    }
    const int64_t copies = capacity_ / length;
    if (count >= copies) add(capacity_, kEmpty, length, copies, count / copies);
    if (count % copies > 0) add(capacity_, kEmpty, length, count % copies, 1);
  }

  Packing finish() && {
    Packing packing{std::move(patterns_), {}};
    for (auto& [room, groups] : open_)
      packing.groups.insert(packing.groups.end(), groups.begin(), groups.end());
    return packing;
  }

  static constexpr int64_t kEmpty = -1;

 private:
  using Rooms = std::map<int64_t, std::vector<Group>>;

  // Fill the last group of bins with this much room, as far as `count` goes; returns items placed.
  int64_t fill(Rooms::iterator where, int64_t length, int64_t count) {
    const int64_t room = where->first;
    const int64_t copies = room / length;
    Group& group = where->second.back();
    const int64_t parent = group.pattern;
    const bool partial = count < copies;
    const int64_t bins = partial ? 1 : std::min(group.bins, count / copies);
    const int64_t each = partial ? count : copies;
    group.bins -= bins;
    if (group.bins == 0) where->second.pop_back();
    if (where->second.empty()) open_.erase(where);
    add(room, parent, length, each, bins);
    return bins * each;
  }

  void add(int64_t room, int64_t parent, int64_t length, int64_t copies, int64_t bins) {
    patterns_.push_back({parent, length, copies});
    const auto pattern = static_cast<int64_t>(patterns_.size()) - 1;
    open_[room - copies * length].push_back({pattern, bins});
  }

  int64_t capacity_;
  std::vector<Pattern> patterns_;
  Rooms open_;
};

template <typename T>
std::vector<int64_t> starts_by_length(const T* lengths, int64_t count, int64_t capacity) {
  std::vector<int64_t> starts(capacity + 2, 0);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t length = lengths[i];
    STD_TORCH_CHECK(length >= 1 && length <= capacity, "best_fit_pack: lengths[", i, "] is ", length,
                    ", expected 1 to ", capacity, " (capacity)");
    ++starts[length + 1];
  }
  for (int64_t length = 1; length <= capacity + 1; ++length) starts[length] += starts[length - 1];
  return starts;
}

// Ids in order of length, shuffled among those of one length.
template <typename T>
std::unique_ptr<uint32_t[]> ids_by_length(const T* lengths, int64_t count,
                                          const std::vector<int64_t>& starts, Random& random) {
  auto ids = std::make_unique_for_overwrite<uint32_t[]>(count);
  std::vector<int64_t> next = starts;
  for (int64_t i = 0; i < count; ++i) ids[next[lengths[i]]++] = static_cast<uint32_t>(i);
  for (size_t length = 1; length + 1 < starts.size(); ++length)
    random.shuffle(ids.get() + starts[length], starts[length + 1] - starts[length]);
  return ids;
}

Packing pack_histogram(const std::vector<int64_t>& starts, int64_t capacity) {
  BestFit best_fit(capacity);
  for (int64_t length = capacity; length >= 1; --length) {
    const int64_t count = starts[length + 1] - starts[length];
    if (count > 0) best_fit.place(length, count);
  }
  return std::move(best_fit).finish();
}

template <typename T>
std::tuple<Tensor, Tensor> pack(const Tensor& lengths, int64_t capacity, int64_t seed) {
  const int64_t count = lengths.numel();
  const T* values = static_cast<const T*>(lengths.const_data_ptr());
  std::vector<int64_t> next = starts_by_length(values, count, capacity);
  Random random(static_cast<uint64_t>(seed));
  const std::unique_ptr<uint32_t[]> ids = ids_by_length(values, count, next, random);
  const Packing packing = pack_histogram(next, capacity);

  std::vector<uint32_t> group_of;
  for (size_t g = 0; g < packing.groups.size(); ++g)
    group_of.insert(group_of.end(), packing.groups[g].bins, static_cast<uint32_t>(g));
  random.shuffle(group_of.data(), group_of.size());

  const auto num_packs = static_cast<int64_t>(group_of.size());
  Tensor order = torch::stable::new_empty(lengths, {count}, ScalarType::Long);
  Tensor offsets = torch::stable::new_empty(lengths, {num_packs + 1}, ScalarType::Long);
  auto* order_out = static_cast<int64_t*>(order.mutable_data_ptr());
  auto* offsets_out = static_cast<int64_t*>(offsets.mutable_data_ptr());
  int64_t laid = 0;
  offsets_out[0] = 0;
  for (int64_t p = 0; p < num_packs; ++p) {
    int64_t node = packing.groups[group_of[p]].pattern;
    while (node != BestFit::kEmpty) {
      const Pattern& pattern = packing.patterns[node];
      std::copy_n(ids.get() + next[pattern.length], pattern.copies, order_out + laid);
      next[pattern.length] += pattern.copies;
      laid += pattern.copies;
      node = pattern.parent;
    }
    offsets_out[p + 1] = laid;
  }
  return {order, offsets};
}

std::tuple<Tensor, Tensor> best_fit_pack(Tensor lengths, int64_t capacity, int64_t seed) {
  STD_TORCH_CHECK(lengths.dim() == 1, "best_fit_pack: lengths has ", lengths.dim(),
                  " dimensions, expected 1");
  STD_TORCH_CHECK(capacity >= 1, "best_fit_pack: capacity is ", capacity, ", expected at least 1");
  STD_TORCH_CHECK(lengths.numel() < (int64_t{1} << 32), "best_fit_pack: ", lengths.numel(),
                  " lengths, expected fewer than 2^32");
  const Tensor dense = torch::stable::contiguous(lengths);
  switch (lengths.scalar_type()) {
    case ScalarType::Int:
      return pack<int32_t>(dense, capacity, seed);
    case ScalarType::Long:
      return pack<int64_t>(dense, capacity, seed);
    default:
      STD_TORCH_CHECK(false, "best_fit_pack: lengths must be int32 or int64");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mcore_sft, CPU, ops) {
  ops.impl("best_fit_pack", TORCH_BOX(&best_fit_pack));
}
