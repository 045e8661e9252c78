// Megatron's greedy blend of several datasets: each sample from the dataset that lags most behind its weight.
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "arrays.h"

namespace {

constexpr size_t kMaxDatasets = 32766;  // numbers are int16, as in Megatron

using Index = std::tuple<Output<int16_t>, Output<int64_t>>;

// The first of the datasets furthest behind after `taken` samples.
size_t most_behind(const Input<double>& weights, const std::vector<int64_t>& counts, int64_t taken) {
  const double position = std::max(static_cast<double>(taken), 1.0);
  size_t chosen = 0;
  double furthest = weights.data()[0] * position - static_cast<double>(counts[0]);
  for (size_t i = 1; i < counts.size(); ++i) {
    const double behind = weights.data()[i] * position - static_cast<double>(counts[i]);
    if (behind > furthest) {
      furthest = behind;
      chosen = i;
    }
  }
  return chosen;
}

Index blend_index(Input<double> weights, int64_t num_samples) {
  if (weights.shape(0) == 0 || weights.shape(0) > kMaxDatasets)
    throw std::invalid_argument("a blend takes 1 to 32766 datasets");
  if (num_samples < 0) throw std::invalid_argument("num_samples has to be 0 or more");
  Buffer<int16_t> datasets(num_samples);
  Buffer<int64_t> samples(num_samples);
  {
    nb::gil_scoped_release release;
    std::vector<int64_t> counts(weights.shape(0), 0);
    for (int64_t i = 0; i < num_samples; ++i) {
      const size_t chosen = most_behind(weights, counts, i);
      datasets[i] = static_cast<int16_t>(chosen);
      samples[i] = counts[chosen]++;
    }
  }
  return {datasets.move_to_numpy(), samples.move_to_numpy()};
}

}  // namespace

void bind_blend(nb::module_& m) {
  m.def("blend_index", &blend_index, nb::arg("weights"), nb::arg("num_samples"));
}
