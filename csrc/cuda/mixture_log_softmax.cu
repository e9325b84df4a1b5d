// Log-probs of a gated mixture over the vocabulary, log m(v) = log sum_k g_k p_k(v), or the means
// over the vocabulary of log m and of the responsibilities r_k = g_k p_k / m.
//
// A team of blocks per row (row_team.cuh), the rows of all experts on chip where they fit
// (expert_rows.cuh). Forward: log-sum-exps, then per column an exponential per expert and one
// logarithm; a column whose mixture is below 2^-100 is added up in logarithms. Backward for an
// upstream c(v): sum_v c r_k first, then dz_k = (c r_k - p_k sum_u c r_k) dz'/dz; the gate's
// gradient needs the first pass only. A column no expert allows has log m = -inf and takes part in
// nothing.

#include "cuda/expert_rows.cuh"
#include "cuda/mixture_row.cuh"

namespace robustgate::cuda {
namespace {

struct Arguments {
  RowsArguments rows;
  const float* gate_logits;  // [N, K] or [K]
  int64_t gate_stride;
  const int64_t* target;  // [N] or null
  float* log_mixture;     // [N, V] or null
  float* mean;            // [N]
  float* share;           // [N, K]
  double* lse;            // [N, K]
};

constexpr int kGroup = 4;  // experts whose sums a thread keeps at a time

// gate[0], gate[1]: g and log2 g of row n, by the first warp.
template <typename T>
__device__ void load_gate(const Arguments& a, int64_t n, RowsMemory<T>& m) {
  if (threadIdx.x >= 32) return;
  const int k = threadIdx.x;
  const bool counts = k < a.rows.spec.experts;
  const double g = softmax_of_lanes(counts ? a.gate_logits[n * a.gate_stride + k] : -INFINITY);
  if (!counts) return;
  m.gate[0][k] = static_cast<float>(g);
  m.gate[1][k] = static_cast<float>(::log2(g));
}

template <typename T>
__device__ bool is_finite(const RowsMemory<T>& m) {
  return m.finite && m.gate[0][0] == m.gate[0][0];
}

// One column of the mixture: m = sum 2^top, with top = 0 unless m is tiny.
struct Gated {
  float sum, top;
  bool tiny, possible;

  template <typename U, typename Scalars, typename Gate>
  __device__ Gated(int experts, const U& u, const Scalars& scalars, const Gate& gate,
                   const Gate& log2_gate, float scale)
      : sum(0.0f), top(0.0f), possible(true) {
#pragma unroll
    for (int k = 0; k < experts; ++k) {
      sum += gate[k] * ::exp2f(log2_prob(u(k), scalars[k], scale));
    }
    tiny = sum < kSmallestMixture;
    if (!tiny) return;
    top = -3e38f;
    sum = 0.0f;
#pragma unroll
    for (int k = 0; k < experts; ++k) {
      top = ::fmaxf(log2_prob(u(k), scalars[k], scale) + log2_gate[k], top);
    }
#pragma unroll
    for (int k = 0; k < experts; ++k) {
      sum += ::exp2f(log2_prob(u(k), scalars[k], scale) + log2_gate[k] - top);
    }
    possible = top >= kImpossible;
  }

  __device__ float log_mixture() const {
    return possible ? (top + ::log2f(sum)) * kLn2 : -INFINITY;
  }
  __device__ float inverse() const { return possible ? 1.0f / sum : 0.0f; }

  // g_k p_k relative to `sum`.
  __device__ float part(float log2_p, float gate, float log2_gate) const {
    return tiny ? ::exp2f(log2_p + log2_gate - top) : gate * ::exp2f(log2_p);
  }
};

// totals[0][k] = sum_v c r_k; returns sum_v of c, or of c log m, over possible columns.
template <int kExperts, bool kLogarithms, typename T>
__device__ double add_up(const Arguments& a, const Upstream& upstream, int64_t begin, int64_t end,
                         Team& team, RowsMemory<T>& m) {
  const int experts = kExperts ? kExperts : static_cast<int>(a.rows.spec.experts);
  const ColumnTransform transform{a.rows.exponent.inner, a.rows.spec.softcap > 0};
  const float scale = a.rows.exponent.scale;
  const PerExpert<kExperts, ExpertScalars> scalars(m.scalars);
  const PerExpert<kExperts, float> gate(m.gate[0]), log2_gate(m.gate[1]);
  double total = 0;
  for (int first = 0; first < experts; first += kGroup) {
    float share[kGroup] = {}, sum = 0.0f;
    for_columns<kExperts>(
        m.row, begin, end, transform, upstream, NoSink(),
        [&](int64_t, const auto& u, float c, const auto&) {
          const Gated mixture(experts, u, scalars, gate, log2_gate, scale);
          const float scaled = c * mixture.inverse();
          sum += kLogarithms ? mixture.log_mixture() : mixture.possible ? c : 0.0f;
#pragma unroll
          for (int i = 0; i < kGroup; ++i) {
            if (first + i >= experts) break;
            const float log2_p = log2_prob(u(first + i), scalars[first + i], scale);
            share[i] += scaled * mixture.part(log2_p, gate[first + i], log2_gate[first + i]);
          }
        });
#pragma unroll
    for (int i = 0; i < kGroup; ++i) team.put(i, Sum{share[i]});
    team.put(kGroup, Sum{sum});
    const Sum* totals = team.merge_all<Sum>(kGroup + 1);
    total = totals[kGroup].value;
    const int i = threadIdx.x;
    if (i < kGroup && first + i < experts) m.totals[0][first + i] = totals[i].value;
  }
  __syncthreads();
  return total;
}

template <int kExperts, typename T>
__device__ void write_row(const Arguments& a, int64_t begin, int64_t end, float* out,
                          const RowsMemory<T>& m) {
  const int experts = kExperts ? kExperts : static_cast<int>(a.rows.spec.experts);
  const ColumnTransform transform{a.rows.exponent.inner, a.rows.spec.softcap > 0};
  const PerExpert<kExperts, ExpertScalars> scalars(m.scalars);
  const PerExpert<kExperts, float> gate(m.gate[0]), log2_gate(m.gate[1]);
  for_columns<kExperts>(m.row, begin, end, transform, Upstream{nullptr, 0.0f}, FloatSink<T>{out},
                        [&](int64_t, const auto& u, float, const auto& emit) {
                          const Gated mixture(experts, u, scalars, gate, log2_gate,
                                              a.rows.exponent.scale);
                          emit(0, mixture.log_mixture());
                        });
}

template <typename T, int kExperts>
__global__ void __launch_bounds__(kRowThreads, 2)
    mixture_log_softmax_kernel(const __grid_constant__ Arguments a) {
  RG_SHARED_MEMORY(bytes);
  auto& m = *reinterpret_cast<RowsMemory<T>*>(bytes);
  const LogitsSpec& spec = a.rows.spec;
  Team team(m.team, a.rows.team, a.rows.exponent.scale);
  const int64_t begin = team.begin(spec.vocab), end = team.end(spec.vocab);
  const int k = threadIdx.x, experts = static_cast<int>(spec.experts);
  for (int64_t n = team.first_row(); n < spec.rows; n += team.row_step()) {
    const bool ignored = a.target && a.target[n] == spec.ignore_index;
    bool finite = true;
    double total = 0;
    if (!ignored) {
      stage_rows(a.rows, n, begin, end, m);
      load_gate(a, n, m);
      log_sum_exps(a.rows, begin, end, team, m);
      relate_experts(spec, a.rows.exponent, m.gate[0], m);
      finite = is_finite(m);
      if (a.log_mixture) {
        float* out = a.log_mixture + n * spec.vocab;
        if (finite) write_row<kExperts>(a, begin, end, out, m);
        for (int64_t v = begin + threadIdx.x; v < end && !finite; v += blockDim.x) out[v] = NAN;
      } else if (finite) {
        total = add_up<kExperts, true>(a, Upstream{nullptr, 1.0f}, begin, end, team, m);
      }
    }
    if (!team.leading_warp()) continue;
    if (k < experts) a.lse[n * experts + k] = ignored ? 0.0 : m.lse[k];
    if (a.log_mixture) continue;
    const double nothing = ignored ? 0.0 : NAN, vocab = static_cast<double>(spec.vocab);
    const bool known = !ignored && finite;
    if (k < experts) {
      a.share[n * experts + k] = static_cast<float>(known ? m.totals[0][k] / vocab : nothing);
    }
    if (k == 0) a.mean[n] = static_cast<float>(known ? total / vocab : nothing);
  }
  team.leave();
}

struct BackwardArguments {
  Arguments forward;
  GradientRows grads;
  const float* grad;  // [N, V], or [N] with per_row
  bool per_row, any;  // any: some logits ask for a gradient
  float* grad_gate;   // [N, K] or null
};

template <typename T, int kExperts>
__global__ void __launch_bounds__(kRowThreads, 2)
    mixture_log_softmax_backward_kernel(const __grid_constant__ BackwardArguments b) {
  RG_SHARED_MEMORY(bytes);
  auto& m = *reinterpret_cast<RowsMemory<T>*>(bytes);
  const Arguments& a = b.forward;
  const LogitsSpec& spec = a.rows.spec;
  const Exponent& e = a.rows.exponent;
  Team team(m.team, a.rows.team, a.rows.exponent.scale);
  const Tile tile(team.begin(spec.vocab), team.end(spec.vocab), team.has_last_columns());
  const ColumnTransform transform{e.inner, spec.softcap > 0};
  const int k = threadIdx.x, experts = kExperts ? kExperts : static_cast<int>(spec.experts);
  for (int64_t n = team.first_row(); n < spec.rows; n += team.row_step()) {
    const bool ignored = a.target && a.target[n] == spec.ignore_index;
    const Upstream upstream{b.per_row ? nullptr : b.grad + n * spec.vocab,
                            b.per_row ? b.grad[n] : 0.0f};
    const bool zero = ignored || (b.per_row && upstream.constant == 0);
    bool computed = !zero;
    if (computed) {
      stage_rows(a.rows, n, tile.begin, tile.end, m);
      load_gate(a, n, m);
      if (k < experts) m.lse[k] = a.lse[n * experts + k];
      relate_experts(spec, e, m.gate[0], m);
      computed = is_finite(m);
    }
    start_gradients(b.grads, spec, n, tile, computed, zero ? 0.0f : NAN, m);
    __syncthreads();
    double total = 0;
    if (computed) {
      total = add_up<kExperts, false>(a, upstream, tile.begin, tile.end, team, m);
    }
    if (b.grad_gate && team.leading_warp() && k < experts) {
      const double gradient = m.totals[0][k] - m.gate[0][k] * total;
      b.grad_gate[n * experts + k] = computed ? static_cast<float>(gradient) : zero ? 0.0f : NAN;
    }
    if (!computed || !b.any) continue;
    const float factor = static_cast<float>(1.0 / spec.temperature);
    const PerExpert<kExperts, ExpertScalars> scalars(m.scalars);
    const PerExpert<kExperts, float> gate(m.gate[0]), log2_gate(m.gate[1]);
    const PerExpert<kExperts, double> totals(m.totals[0]);
    for_columns<kExperts>(
        m.row, tile.begin, tile.end, transform, upstream, GradientSink<kExperts, T>{m.grad},
        [&](int64_t, const auto& u, float c, const auto& emit) {
          const Gated mixture(experts, u, scalars, gate, log2_gate, e.scale);
          const float scaled = c * mixture.inverse();
#pragma unroll
          for (int i = 0; i < experts; ++i) {
            const float log2_p = log2_prob(u(i), scalars[i], e.scale);
            const float dz = scaled * mixture.part(log2_p, gate[i], log2_gate[i]) -
                             ::exp2f(log2_p) * static_cast<float>(totals[i]);
            emit(i, dz * factor * transform.slope(u(i)));
          }
        });
  }
  team.leave();
}

Arguments arguments(const MixtureLogSoftmax& op) {
  return {rows_arguments(op.spec, op.logits),
          op.gate_logits,
          op.gate_stride,
          op.target,
          op.log_mixture,
          op.mean,
          op.share,
          op.lse};
}

}  // namespace

const char* mixture_log_softmax(const MixtureLogSoftmax& op, int device, void* stream) {
  if (op.spec.rows == 0) return nullptr;
  Arguments a = arguments(op);
  return on_device(device, [&] {
    return for_experts(op.spec, [&](auto zero, auto experts) {
      using T = decltype(zero);
      const Grid grid = plan_rows(a.rows, sizeof(RowsMemory<T>), device);
      return launch(mixture_log_softmax_kernel<T, decltype(experts)::value>, grid, stream, a);
    });
  });
}

const char* mixture_log_softmax_backward(const MixtureLogSoftmaxBackward& op, int device,
                                         void* stream) {
  const LogitsSpec& spec = op.forward.spec;
  if (spec.rows == 0) return nullptr;
  BackwardArguments b{arguments(op.forward), gradient_rows(spec, op.grad_logits, op.padded_vocab),
                      op.grad, op.grad_per_row};
  for (int64_t k = 0; k < spec.experts; ++k) b.any = b.any || op.grad_logits[k].data;
  b.grad_gate = op.grad_gate_logits;
  return on_device(device, [&] {
    return for_experts(spec, [&](auto zero, auto experts) {
      using T = decltype(zero);
      const Grid grid = plan_rows(b.forward.rows, sizeof(RowsMemory<T>), device);
      return launch(mixture_log_softmax_backward_kernel<T, decltype(experts)::value>, grid, stream,
                    b);
    });
  });
}

}  // namespace robustgate::cuda
