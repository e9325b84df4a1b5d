// Python entry points: integers in (data pointers, sizes, strides in elements, codes), nothing of
// torch. The caller (robustgate/ops/backends) has checked dtypes, shapes, devices and strides.
//
// Logits travel as one flat list of 3 integers per expert: data pointer, outer and inner row
// stride. The last argument says where to run: (-1, threads) on the CPU, (device, stream) on CUDA.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "ops.h"

namespace py = pybind11;
using robustgate::LogitRows;

namespace {

using Integers = std::vector<int64_t>;

template <typename T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

using Where = std::pair<int, int64_t>;  // (-1, threads) or (CUDA device, stream)

#ifdef ROBUSTGATE_WITH_CUDA
#define RG_RUN(name, where, op) \
  run(#name, where, op, &robustgate::cpu::name, &robustgate::cuda::name)
#else
#define RG_RUN(name, where, op) run(#name, where, op, &robustgate::cpu::name, nullptr)
#endif

// Runs an op on the CPU and returns what its kernel does, or launches it on a CUDA device.
template <typename Op, typename Result>
Result run(const char* name, const Where& where, const Op& op, Result (*cpu)(const Op&, int),
           std::type_identity_t<const char* (*)(const Op&, int, void*)> cuda) {
  const auto [device, handle] = where;
  const char* error = nullptr;
  {
    py::gil_scoped_release release;
    if (device < 0) return cpu(op, static_cast<int>(handle));
    error = cuda ? cuda(op, device, pointer<void>(handle)) : "built without CUDA";
  }
  if (error) throw std::runtime_error(std::string("robustgate::") + name + ": " + error);
  if constexpr (!std::is_void_v<Result>) return robustgate::kAllTargetsValid;
}

std::vector<LogitRows> logit_rows(const Integers& flat) {
  std::vector<LogitRows> rows(flat.size() / 3);
  for (size_t k = 0; k < rows.size(); ++k) {
    rows[k] = {pointer<void>(flat[3 * k]), flat[3 * k + 1], flat[3 * k + 2]};
  }
  return rows;
}

// (rows, inner_rows, vocab, ignore_index, temperature, softcap, dtype)
using Spec = std::tuple<int64_t, int64_t, int64_t, int64_t, double, double, int>;

robustgate::LogitsSpec logits_spec(const Spec& spec, size_t experts) {
  const auto& [rows, inner_rows, vocab, ignore_index, temperature, softcap, dtype] = spec;
  return {rows,         inner_rows,  vocab,   static_cast<int64_t>(experts),
          ignore_index, temperature, softcap, static_cast<robustgate::DType>(dtype)};
}

int64_t expert_log_prob(const Integers& logits, int64_t target, int64_t log_prob, int64_t lse,
                        const Spec& spec, const Where& where) {
  const auto rows = logit_rows(logits);
  const robustgate::ExpertLogProb op{logits_spec(spec, rows.size()), rows.data(),
                                     pointer<int64_t>(target), pointer<void>(log_prob),
                                     pointer<double>(lse)};
  return RG_RUN(expert_log_prob, where, op);
}

void expert_log_prob_backward(const Integers& logits, int64_t target, int64_t lse, int64_t grad,
                              int64_t grad_lse, const Integers& grad_logits,
                              const Integers& padded_vocab, const Spec& spec, const Where& where) {
  const auto rows = logit_rows(logits);
  const auto grad_rows = logit_rows(grad_logits);
  const robustgate::ExpertLogProbBackward op{logits_spec(spec, rows.size()),
                                             rows.data(),
                                             pointer<int64_t>(target),
                                             pointer<double>(lse),
                                             pointer<void>(grad),
                                             pointer<void>(grad_lse),
                                             grad_rows.data(),
                                             padded_vocab.data()};
  RG_RUN(expert_log_prob_backward, where, op);
}

// (rows, experts, gate_stride, ignore_index, sign, dtype)
using MixtureSpec = std::tuple<int64_t, int64_t, int64_t, int64_t, double, int>;

robustgate::MixtureLogProb mixture(int64_t log_prob, int64_t gate_logits, int64_t target,
                                   int64_t out, const MixtureSpec& spec) {
  const auto& [rows, experts, gate_stride, ignore_index, sign, dtype] = spec;
  return {rows,
          experts,
          static_cast<robustgate::DType>(dtype),
          pointer<void>(log_prob),
          pointer<void>(gate_logits),
          gate_stride,
          pointer<int64_t>(target),
          ignore_index,
          sign,
          pointer<void>(out)};
}

void mixture_log_prob(int64_t log_prob, int64_t gate_logits, int64_t target, int64_t out,
                      const MixtureSpec& spec, const Where& where) {
  const robustgate::MixtureLogProb op = mixture(log_prob, gate_logits, target, out, spec);
  RG_RUN(mixture_log_prob, where, op);
}

int64_t mixture_nll(const Integers& logits, int64_t gate_logits, int64_t gate_stride,
                    int64_t target, int64_t nll, int64_t log_prob, int64_t lse, const Spec& spec,
                    const Where& where) {
  const auto rows = logit_rows(logits);
  const robustgate::MixtureNLL op{
      {logits_spec(spec, rows.size()), rows.data(), pointer<int64_t>(target),
       pointer<void>(log_prob), pointer<double>(lse)},
      pointer<void>(gate_logits),
      gate_stride,
      pointer<void>(nll)};
  return RG_RUN(mixture_nll, where, op);
}

void mixture_log_prob_backward(int64_t log_prob, int64_t gate_logits, int64_t target, int64_t grad,
                               int64_t grad_log_prob, int64_t grad_gate_logits,
                               const MixtureSpec& spec, const Where& where) {
  const robustgate::MixtureLogProbBackward op{mixture(log_prob, gate_logits, target, 0, spec),
                                              pointer<void>(grad), pointer<void>(grad_log_prob),
                                              pointer<void>(grad_gate_logits)};
  RG_RUN(mixture_log_prob_backward, where, op);
}

// (address, row stride) of gate logits or weights
using PerRow = std::pair<int64_t, int64_t>;

void jsd(const Integers& logits, PerRow weights, int64_t target, int64_t given_lse, int64_t value,
         int64_t kl, int64_t lse, const Spec& spec, const Where& where) {
  const auto rows = logit_rows(logits);
  const robustgate::JSD op{logits_spec(spec, rows.size()),
                           rows.data(),
                           pointer<float>(weights.first),
                           weights.second,
                           pointer<int64_t>(target),
                           pointer<double>(given_lse),
                           pointer<float>(value),
                           pointer<float>(kl),
                           pointer<double>(lse)};
  RG_RUN(jsd, where, op);
}

void jsd_backward(const Integers& logits, PerRow weights, int64_t target, int64_t lse, int64_t kl,
                  int64_t grad, const Integers& grad_logits, const Integers& padded_vocab,
                  const Spec& spec, const Where& where) {
  const auto rows = logit_rows(logits);
  const auto grad_rows = logit_rows(grad_logits);
  const robustgate::JSDBackward op{logits_spec(spec, rows.size()),
                                   rows.data(),
                                   pointer<float>(weights.first),
                                   weights.second,
                                   pointer<int64_t>(target),
                                   pointer<double>(lse),
                                   pointer<float>(kl),
                                   pointer<float>(grad),
                                   grad_rows.data(),
                                   padded_vocab.data()};
  RG_RUN(jsd_backward, where, op);
}

robustgate::MixtureKL kl_between(const std::vector<LogitRows>& rows, PerRow teacher, PerRow student,
                                 int64_t target, int64_t value, int64_t tilt, int64_t lse,
                                 const Spec& spec) {
  return {logits_spec(spec, rows.size()), rows.data(),
          pointer<float>(teacher.first),  teacher.second,
          pointer<float>(student.first),  student.second,
          pointer<int64_t>(target),       pointer<float>(value),
          pointer<float>(tilt),           pointer<double>(lse)};
}

void mixture_kl(const Integers& logits, PerRow teacher, PerRow student, int64_t target,
                int64_t value, int64_t tilt, int64_t lse, const Spec& spec, const Where& where) {
  const auto rows = logit_rows(logits);
  const robustgate::MixtureKL op =
      kl_between(rows, teacher, student, target, value, tilt, lse, spec);
  RG_RUN(mixture_kl, where, op);
}

void mixture_kl_backward(const Integers& logits, PerRow teacher, PerRow student, int64_t target,
                         int64_t value, int64_t lse, int64_t grad, const Integers& grad_logits,
                         const Integers& padded_vocab, const Spec& spec, const Where& where) {
  const auto rows = logit_rows(logits);
  const auto grad_rows = logit_rows(grad_logits);
  const robustgate::MixtureKLBackward op{
      kl_between(rows, teacher, student, target, value, 0, lse, spec), pointer<float>(grad),
      grad_rows.data(), padded_vocab.data()};
  RG_RUN(mixture_kl_backward, where, op);
}

robustgate::MixtureLogSoftmax gated(const std::vector<LogitRows>& rows, PerRow gate, int64_t target,
                                    int64_t log_mixture, int64_t mean, int64_t share, int64_t lse,
                                    const Spec& spec) {
  return {logits_spec(spec, rows.size()),
          rows.data(),
          pointer<float>(gate.first),
          gate.second,
          pointer<int64_t>(target),
          pointer<float>(log_mixture),
          pointer<float>(mean),
          pointer<float>(share),
          pointer<double>(lse)};
}

void mixture_log_softmax(const Integers& logits, PerRow gate, int64_t target, int64_t log_mixture,
                         int64_t mean, int64_t share, int64_t lse, const Spec& spec,
                         const Where& where) {
  const auto rows = logit_rows(logits);
  const robustgate::MixtureLogSoftmax op =
      gated(rows, gate, target, log_mixture, mean, share, lse, spec);
  RG_RUN(mixture_log_softmax, where, op);
}

void mixture_log_softmax_backward(const Integers& logits, PerRow gate, int64_t target, int64_t lse,
                                  int64_t grad, bool grad_per_row, int64_t grad_gate_logits,
                                  const Integers& grad_logits, const Integers& padded_vocab,
                                  const Spec& spec, const Where& where) {
  const auto rows = logit_rows(logits);
  const auto grad_rows = logit_rows(grad_logits);
  const robustgate::MixtureLogSoftmaxBackward op{gated(rows, gate, target, 0, 0, 0, lse, spec),
                                                 pointer<float>(grad),
                                                 grad_per_row,
                                                 pointer<float>(grad_gate_logits),
                                                 grad_rows.data(),
                                                 padded_vocab.data()};
  RG_RUN(mixture_log_softmax_backward, where, op);
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Compiled kernels of robustgate. Private: use the functions of robustgate.ops.";
  m.def("instruction_set", &robustgate::cpu::instruction_set);
  m.def("expert_log_prob", &expert_log_prob);
  m.def("expert_log_prob_backward", &expert_log_prob_backward);
  m.def("mixture_nll", &mixture_nll);
  m.def("mixture_log_prob", &mixture_log_prob);
  m.def("mixture_log_prob_backward", &mixture_log_prob_backward);
  m.def("jsd", &jsd);
  m.def("jsd_backward", &jsd_backward);
  m.def("mixture_kl", &mixture_kl);
  m.def("mixture_kl_backward", &mixture_kl_backward);
  m.def("mixture_log_softmax", &mixture_log_softmax);
  m.def("mixture_log_softmax_backward", &mixture_log_softmax_backward);
#ifdef ROBUSTGATE_WITH_CUDA
  m.attr("cuda_version") = robustgate::cuda::compiled_version();
  m.def("cuda_why_unusable", [](int device) -> std::optional<std::string> {
    const char* reason = robustgate::cuda::why_unusable(device);
    return reason ? std::optional<std::string>(reason) : std::nullopt;
  });
#else
  m.attr("cuda_version") = py::none();
#endif
}
