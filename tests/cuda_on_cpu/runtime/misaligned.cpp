// Kernels are compiled with -fsanitize=alignment, which calls this for a misaligned load or store.

#include "runtime/engine.h"

namespace {

struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

}  // namespace

// The first member of the compiler's data is where in the source it happened.
extern "C" void __ubsan_handle_type_mismatch_v1(const SourceLocation* where, uintptr_t address) {
  if (!cuda_on_cpu::self) return;
  cuda_on_cpu::fail("misaligned address ...%03zx at %s:%u", address % 4096, where->file,
                    where->line);
}
