// The module llmpipe.helpers: pure functions from arrays to new arrays. Bad input is std::invalid_argument, which
// Python sees as ValueError; the GIL is released while they compute; nothing is printed.
#include "arrays.h"

void bind_blend(nb::module_& m);
void bind_gpt_index(nb::module_& m);
void bind_indexed(nb::module_& m);

NB_MODULE(helpers, m) {
  m.doc() = "The index of .bin/.idx datasets and Megatron's sample and blend indices, compiled.";
  bind_indexed(m);
  bind_gpt_index(m);
  bind_blend(m);
}
