// Jensen-Shannon divergence of K experts: KL_k = sum_v p_k log(p_k / m), m = sum_k w_k p_k, and
// JSD = sum_k w_k KL_k.
//
// Forward: a team of blocks per row (row_team.cuh), the rows of all experts on chip where they fit
// (expert_rows.cuh). Two passes: log-sum-exps; then, per column, an exponential per expert and one
// logarithm, log2(p_k / m) times p_k summed in float32 per thread and float64 beyond. A row whose
// divergences come out below 1/32 nats, or with a weight below 1e-6, is compared once more without
// cancellation (common/jsd_column.h), and where experts are nearly equal their log-sum-exps are
// corrected and the row is done again. K = 2 and 4 are compiled with K fixed; any other K reads a
// column's logits from shared memory as often as it needs them.
// Backward: dz_k = g w_k p_k (log(p_k / m) - KL_k) dz'/dz; blocks of (row, tile of columns), one
// read and one write.

#include "common/jsd_column.h"
#include "cuda/expert_rows.cuh"

namespace robustgate::cuda {
namespace {

struct Arguments {
  RowsArguments rows;
  const float* weights;  // [N, K] or [K]
  int64_t weight_stride;
  const int64_t* target;    // [N] or null
  const double* given_lse;  // [N, K] or null
  float* value;             // [N]
  float* kl;                // [N, K]
  double* lse;              // [N, K]
};

// Experts whose sums a thread keeps at a time.
template <int kExperts>
constexpr int kGroup = kExperts ? kExperts : 4;

// totals[0][k] = KL_k from sums of p_k log2(p_k / m); whether that is enough.
template <int kExperts, typename T>
__device__ bool compare_sums(const Arguments& a, int64_t begin, int64_t end, Team& team,
                             RowsMemory<T>& m) {
  const int experts = kExperts ? kExperts : static_cast<int>(a.rows.spec.experts);
  for (int k = 0; k < experts; ++k) {
    if (!(m.gate[0][k] >= kSmallestWeight)) return false;
  }
  const ColumnTransform transform{a.rows.exponent.inner, a.rows.spec.softcap > 0};
  const float scale = a.rows.exponent.scale;
  const PerExpert<kExperts, ExpertScalars> scalars(m.scalars);
  const PerExpert<kExperts, float> weight(m.gate[0]);
  bool apart = true;
  for (int first = 0; first < experts; first += kGroup<kExperts>) {
    float sum[kGroup<kExperts>] = {};
    for_columns<kExperts>(m.row, begin, end, transform, Upstream{nullptr, 0.0f}, NoSink(),
                          [&](int64_t, const auto& u, float, const auto&) {
                            float mixture = 0.0f;
#pragma unroll
                            for (int k = 0; k < experts; ++k) {
                              mixture += weight[k] * ::exp2f(log2_prob(u(k), scalars[k], scale));
                            }
                            const float log2_mixture = __log2f(::fmaxf(mixture, kTiny));
#pragma unroll
                            for (int i = 0; i < kGroup<kExperts>; ++i) {
                              if (first + i >= experts) break;
                              const float log2_p =
                                  log2_prob(u(first + i), scalars[first + i], scale);
                              sum[i] += ::exp2f(log2_p) * (log2_p - log2_mixture);
                            }
                          });
#pragma unroll
    for (int i = 0; i < kGroup<kExperts>; ++i) team.put(i, Sum{sum[i]});
    const Sum* totals = team.merge_all<Sum>(kGroup<kExperts>);
    for (int i = 0; i < kGroup<kExperts> && first + i < experts; ++i) {
      const double kl = totals[i].value / kLog2EDouble;
      apart = apart && kl >= kApart;  // also false for NaN
      if (threadIdx.x == 0) m.totals[0][first + i] = kl;
    }
  }
  __syncthreads();
  return apart;
}

// The same without cancellation. Corrects lse where experts are nearly equal.
template <typename T>
__device__ void compare_columns(const Arguments& a, int64_t begin, int64_t end, Team& team,
                                RowsMemory<T>& m) {
  constexpr int kGroup = 4;
  const int experts = static_cast<int>(a.rows.spec.experts);
  const Exponent& e = a.rows.exponent;
  const ColumnTransform transform{e.inner, a.rows.spec.softcap > 0};
  for (int attempt = 0; attempt < 2; ++attempt) {
    double distance = 0;
    for (int first = 0; first < experts; first += kGroup) {
      float kl[kGroup] = {}, error[kGroup] = {}, squared = 0.0f;
      for (int64_t v = begin + threadIdx.x; v < end; v += blockDim.x) {
        const StagedColumn<T> column{m, transform, experts, v};
        const JsdColumn j = jsd_column(column, e);
        squared += j.distance;
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          if (first + i >= experts) break;
          const JsdSums sums = jsd_sums(column, j, first + i, e);
          kl[i] += sums.kl;
          error[i] += sums.error;
        }
      }
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        team.put(i, Sum{kl[i]});
        team.put(kGroup + i, Sum{error[i]});
      }
      team.put(2 * kGroup, Sum{squared});
      const Sum* sums = team.merge_all<Sum>(2 * kGroup + 1);
      distance = sums[2 * kGroup].value;
      const int i = threadIdx.x;
      if (i < kGroup && first + i < experts) {
        m.totals[0][first + i] = sums[i].value < 0 ? 0.0 : sums[i].value;  // rounding
        m.totals[1][first + i] = sums[kGroup + i].value;
      }
    }
    __syncthreads();
    if (a.given_lse || attempt > 0 || !correct_log_sum_exps(experts, distance, m.totals[1], m)) {
      return;
    }
    relate_experts(a.rows.spec, e, m.gate[0], m);
  }
}

template <typename T, int kExperts>
__global__ void __launch_bounds__(kRowThreads, 2) jsd_kernel(const __grid_constant__ Arguments a) {
  RG_SHARED_MEMORY(bytes);
  auto& m = *reinterpret_cast<RowsMemory<T>*>(bytes);
  const LogitsSpec& spec = a.rows.spec;
  Team team(m.team, a.rows.team, a.rows.exponent.scale);
  const int64_t begin = team.begin(spec.vocab), end = team.end(spec.vocab);
  const int k = threadIdx.x, experts = static_cast<int>(spec.experts);
  for (int64_t n = team.first_row(); n < spec.rows; n += team.row_step()) {
    const bool ignored = a.target && a.target[n] == spec.ignore_index;
    if (!ignored) {
      stage_rows(a.rows, n, begin, end, m);
      if (k < experts) m.gate[0][k] = a.weights[n * a.weight_stride + k];
      if (a.given_lse) {
        if (k < experts) m.lse[k] = a.given_lse[n * experts + k];
      } else {
        log_sum_exps(a.rows, begin, end, team, m);
      }
      relate_experts(spec, a.rows.exponent, m.gate[0], m);
      if (m.finite && (a.given_lse || !compare_sums<kExperts>(a, begin, end, team, m))) {
        compare_columns(a, begin, end, team, m);
      }
      __syncthreads();
    }
    if (!team.leading_warp()) continue;
    if (k < experts) {
      a.lse[n * experts + k] = ignored ? 0.0 : m.lse[k];
      a.kl[n * experts + k] = ignored ? 0.0f : m.finite ? static_cast<float>(m.totals[0][k]) : NAN;
    }
    if (k == 0) {
      double value = 0;
      for (int i = 0; i < experts && !ignored; ++i) {
        if (m.gate[0][i] != 0) value += m.gate[0][i] * m.totals[0][i];
      }
      a.value[n] = ignored ? 0.0f : m.finite ? static_cast<float>(value) : NAN;
    }
  }
  team.leave();
}

struct BackwardArguments {
  RowsArguments rows;
  GradientRows grads;
  const float* weights;
  int64_t weight_stride;
  const int64_t* target;  // [N] or null
  const double* lse;      // [N, K]
  const float* kl;        // [N, K]
  const float* grad;      // [N]
  int64_t tiles, tile_columns;
};

template <typename T, int kExperts>
__global__ void __launch_bounds__(kTileThreads, 2)
    jsd_backward_kernel(const __grid_constant__ BackwardArguments a) {
  RG_SHARED_MEMORY(bytes);
  auto& m = *reinterpret_cast<RowsMemory<T>*>(bytes);
  const LogitsSpec& spec = a.rows.spec;
  const Exponent& e = a.rows.exponent;
  const int experts = kExperts ? kExperts : static_cast<int>(spec.experts), k = threadIdx.x;
  const int64_t n = blockIdx.x / a.tiles;
  const Tile tile(blockIdx.x % a.tiles, a.tiles, a.tile_columns, spec.vocab);
  const bool ignored = a.target && a.target[n] == spec.ignore_index;
  const float grad = ignored ? 0.0f : a.grad[n];
  // gate[0]: the weights, [1]: the factors of the gradients, [2]: KL_k
  if (k < experts) {
    const float weight = a.weights[n * a.weight_stride + k];
    m.gate[0][k] = weight;
    m.gate[1][k] = static_cast<float>(static_cast<double>(grad) * weight / spec.temperature);
    m.gate[2][k] = a.kl[n * experts + k];
    m.lse[k] = a.lse[n * experts + k];
    m.row[k] = static_cast<const T*>(a.rows.logits[k].data) + row_offset(a.rows.logits[k], spec, n);
  }
  relate_experts(spec, e, m.gate[0], m);
  const bool computed = grad != 0 && m.finite;
  start_gradients(a.grads, spec, n, tile, computed, grad == 0 ? 0.0f : NAN, m);
  __syncthreads();
  if (!computed) return;

  bool apart = true;
  for (int i = 0; i < experts; ++i) {
    apart = apart && m.gate[0][i] >= kSmallestWeight && m.gate[2][i] >= kApart;
  }
  const ColumnTransform transform{e.inner, spec.softcap > 0};
  if (apart) {
    const PerExpert<kExperts, ExpertScalars> scalars(m.scalars);
    const PerExpert<kExperts, float> weight(m.gate[0]), factor(m.gate[1]), kl(m.gate[2]);
    for_columns<kExperts>(
        m.row, tile.begin, tile.end, transform, Upstream{nullptr, 0.0f},
        GradientSink<kExperts, T>{m.grad}, [&](int64_t, const auto& u, float, const auto& emit) {
          float mixture = 0.0f;
#pragma unroll
          for (int i = 0; i < experts; ++i) {
            mixture += weight[i] * ::exp2f(log2_prob(u(i), scalars[i], e.scale));
          }
          const float log2_mixture = __log2f(::fmaxf(mixture, kTiny));
#pragma unroll
          for (int i = 0; i < experts; ++i) {
            const float log2_p = log2_prob(u(i), scalars[i], e.scale);
            const float log_ratio = (log2_p - log2_mixture) * kLn2;
            emit(i, factor[i] * ::exp2f(log2_p) * (log_ratio - kl[i]) * transform.slope(u(i)));
          }
        });
    return;
  }
  for (int64_t v = tile.begin + threadIdx.x; v < tile.end; v += blockDim.x) {
    const StagedColumn<T> column{m, transform, experts, v};
    const JsdColumn j = jsd_column(column, e);
    for (int i = 0; i < experts; ++i) {
      if (m.grad[i] == nullptr) continue;
      const JsdTerm term = jsd_term(column, j, i, e);
      const float dz = term.p == 0 || m.gate[1][i] == 0
                           ? 0.0f
                           : m.gate[1][i] * term.p * (term.log_ratio - m.gate[2][i]);
      m.grad[i][v] = from_float<T>(dz * transform.slope(column.u(i)));
    }
  }
}

}  // namespace

const char* jsd(const JSD& op, int device, void* stream) {
  if (op.spec.rows == 0) return nullptr;
  Arguments a{rows_arguments(op.spec, op.logits),
              op.weights,
              op.weight_stride,
              op.target,
              op.given_lse,
              op.value,
              op.kl,
              op.lse};
  return on_device(device, [&] {
    return for_experts(op.spec, [&](auto zero, auto experts) {
      using T = decltype(zero);
      const Grid grid = plan_rows(a.rows, sizeof(RowsMemory<T>), device);
      return launch(jsd_kernel<T, decltype(experts)::value>, grid, stream, a);
    });
  });
}

const char* jsd_backward(const JSDBackward& op, int device, void* stream) {
  if (op.spec.rows == 0) return nullptr;
  BackwardArguments a{rows_arguments(op.spec, op.logits),
                      gradient_rows(op.spec, op.grad_logits, op.padded_vocab),
                      op.weights,
                      op.weight_stride,
                      op.target,
                      op.lse,
                      op.kl,
                      op.grad};
  a.tile_columns = tile_columns(op.spec, op.spec.rows, device);
  a.tiles = Tile::count(op.spec.vocab, a.tile_columns);
  return on_device(device, [&] {
    return for_experts(op.spec, [&](auto zero, auto experts) {
      using T = decltype(zero);
      const Grid grid{op.spec.rows * a.tiles, kTileThreads, 1, sizeof(RowsMemory<T>)};
      return launch(jsd_backward_kernel<T, decltype(experts)::value>, grid, stream, a);
    });
  });
}

}  // namespace robustgate::cuda
