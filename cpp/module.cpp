// The module llmpipe.helpers: functions on arrays. Bad input is std::invalid_argument, which
// Python sees as ValueError; the GIL is released while they compute; nothing is printed.
#include "arrays.h"

void bind_blend(nb::module_& m);
void bind_encoder(nb::module_& m);
void bind_gather(nb::module_& m);
void bind_gpt_index(nb::module_& m);
void bind_indexed(nb::module_& m);
void bind_json_lines(nb::module_& m);
void bind_samples(nb::module_& m);
void bind_sha256(nb::module_& m);

NB_MODULE(helpers, m) {
  m.doc() = "The index of .bin/.idx datasets, Megatron's sample and blend indices, the byte mover, SHA-256, a reader of JSON lines and encoders of text, compiled.";
  // A command ends without a last look for garbage (gc.freeze in llmpipe.cli), so that cycles, as the frames of an error,
  // may hold objects of this module until then: no fault, and not the last thing for a user to read.
  nb::set_leak_warnings(false);
  bind_indexed(m);
  bind_gpt_index(m);
  bind_blend(m);
  bind_samples(m);
  bind_gather(m);
  bind_encoder(m);
  bind_json_lines(m);
  bind_sha256(m);
}
