// The module llmpipe.helpers: pure functions from arrays to new arrays; ValueError for bad input; the GIL is released.
#include "arrays.h"

void bind_indexed(nb::module_& m);

NB_MODULE(helpers, m) {
  m.doc() = "Index work of .bin/.idx datasets and Megatron's sample index, compiled.";
  bind_indexed(m);
}
