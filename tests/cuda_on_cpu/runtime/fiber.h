// A fiber: a stack and a place to go on from. Only one runs at a time, until it switches away.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace cuda_on_cpu {

#if defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)

// Some 2 ns a switch, against 250 ns of ucontext, whose every switch is a system call.
struct Context {
  void* stack_pointer;
};

// Saves what a callee has to preserve on the stack left, and restores it from the stack entered.
__attribute__((naked, noinline)) inline void switch_stack(void** /*save*/, void* /*load*/) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15;"
      "movq %rsp, (%rdi); movq %rsi, %rsp;"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}

inline void switch_context(Context& from, Context& to) {
  switch_stack(&from.stack_pointer, to.stack_pointer);
}

// `entry` never returns.
inline void prepare(Context& context, void* stack, size_t bytes, void (*entry)()) {
  const uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + bytes) / 16 * 16;
  auto* frame = reinterpret_cast<uintptr_t*>(top) - 8;  // 6 registers, the return address, padding
  std::memset(frame, 0, 8 * sizeof *frame);
  frame[6] = reinterpret_cast<uintptr_t>(entry);
  context.stack_pointer = frame;
}

#else
}  // namespace cuda_on_cpu
#include <ucontext.h>
namespace cuda_on_cpu {

using Context = ucontext_t;

inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

inline void prepare(Context& context, void* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

#endif

}  // namespace cuda_on_cpu
