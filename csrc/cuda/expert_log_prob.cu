// Expert log-probabilities: l[n, k] = z'[n, k, y] - log sum_v exp z'[n, k, v], and the gradient
// dz[n, k, v] = [a (1[v = y] - p) + b p] dz'/dz,  p = exp(z' - lse), recomputed.
//
// Forward: a team of blocks per row (row_team.cuh) reads the row of one expert after the other,
// once, with four 16-byte loads in flight per thread. Warps meet once a row, when all experts are
// read; then one lane an expert finishes, and for mixture_nll the lanes add up the mixture. Base-2
// online log-sum-exp in float32 relative to the largest exponent so far, one rescale a pack; the
// rest in float64. Ignored rows are not read and give 0; a target out of range gives NaN.
// Backward: blocks of (row, expert, tile of columns), one read and one write. Padding gets 0.

#include "cuda/expert_log_prob.cuh"

#include "common/column.h"
#include "cuda/mixture_row.cuh"
#include "cuda/row_state.cuh"
#include "cuda/row_team.cuh"
#include "cuda/tiles.cuh"

namespace robustgate::cuda {
namespace {

static_assert(kExpertsPerLaunch <= kMaxSums);

constexpr int kStreamThreads = 256;

struct LogProbArguments {
  LogitRows logits[kExpertsPerLaunch];
  LogitsSpec spec;
  Exponent exponent;
  const int64_t* target;  // [N]
  float* log_prob;        // [N, K]
  double* lse;            // [N, K]
  const float* gate;      // [N, K] or [K]
  int64_t gate_stride;
  float* nll;          // [N], or null
  int experts, first;  // of this launch; column of logits[0] in the results
  int team;
};

// u of one column in float64: the logit, or the softcap's tanh.
__device__ __forceinline__ double exact_u(float z, const LogitsSpec& spec) {
  return spec.softcap > 0 ? ::tanh(z / spec.softcap) : z;
}

template <typename T>
__global__ void __launch_bounds__(kStreamThreads, 4)
    expert_log_prob_kernel(const __grid_constant__ LogProbArguments a) {
  RG_SHARED_MEMORY(bytes);
  Team team(*reinterpret_cast<TeamMemory*>(bytes), a.team, a.exponent.scale);
  const ColumnTransform transform{a.exponent.inner, a.spec.softcap > 0};
  const int64_t begin = team.begin(a.spec.vocab), end = team.end(a.spec.vocab);
  for (int64_t n = team.first_row(); n < a.spec.rows; n += team.row_step()) {
    const int64_t y = a.target[n];
    const bool ignored = y == a.spec.ignore_index;
    const bool known = !ignored && y >= 0 && y < a.spec.vocab;  // the same for the whole team
    const OnlineSoftmax<float>* states = nullptr;
    if (known) {
      for (int k = 0; k < a.experts; ++k) {
        const T* z = static_cast<const T*>(a.logits[k].data) + row_offset(a.logits[k], a.spec, n);
        team.put(k, row_state<true>(z, begin, end, a.exponent.scale, transform));
      }
      states = team.merge_all<OnlineSoftmax<float>>(a.experts);
    }
    if (!team.leading_warp()) continue;
    const int k = threadIdx.x;  // below 32: one lane an expert
    const int64_t out = n * a.spec.experts + a.first + k;
    float log_prob = known ? -INFINITY : NAN;
    if (k < a.experts) {
      double lse = ignored ? 0.0 : NAN;
      if (known) {
        const T* z = static_cast<const T*>(a.logits[k].data) + row_offset(a.logits[k], a.spec, n);
        const double log_sum = log_of_sum(states[k], a.exponent), top = states[k].summable_max();
        const double exact = (exact_u(to_float(z[y]), a.spec) - top) * a.exponent.unit - log_sum;
        lse = top * a.exponent.unit + log_sum;
        log_prob = static_cast<float>(exact > 0 ? 0.0 : exact);  // no probability exceeds 1
      }
      a.log_prob[out] = ignored ? 0.0f : log_prob;
      a.lse[out] = lse;
    }
    if (a.nll) {
      const float gate = k < a.experts ? a.gate[n * a.gate_stride + k] : -INFINITY;
      const float value = -mixture_of_lanes(log_prob, gate);
      if (k == 0) a.nll[n] = ignored ? 0.0f : value;
    }
  }
  team.leave();
}

// Blocks for a row: more than one where a row is long, or where there are too few rows to fill the
// device, as long as every thread has eight packs of its own.
inline int streaming_team(const LogitsSpec& spec, int threads, const DeviceLimits& limits) {
  const int64_t packs = spec.vocab * size_of(spec.dtype) / 16;
  const int64_t enough = int64_t{64} * limits.multiprocessors;
  int team = 1;
  while (2 * team <= limits.largest_cluster && 2 * team <= 8 && spec.rows * team < enough &&
         packs >= int64_t{16} * team * threads) {
    team *= 2;
  }
  return team;
}

// Fewer threads where a row is short, so that each has work.
inline int streaming_threads(const LogitsSpec& spec) {
  return spec.vocab * size_of(spec.dtype) < 32 * 1024 ? kStreamThreads / 2 : kStreamThreads;
}

struct GradientArguments {
  LogitRows logits[kExpertsPerLaunch], grads[kExpertsPerLaunch];
  int64_t padded_vocab[kExpertsPerLaunch];
  LogitsSpec spec;
  Exponent exponent;
  const int64_t* target;  // [N]
  const double* lse;      // [N, K]
  const float* grad;      // [N, K]
  const float* grad_lse;  // [N, K] or null
  int experts, first;
  int64_t tiles, tile_columns;
};

template <typename T>
__global__ void __launch_bounds__(kTileThreads, 3)
    expert_log_prob_backward_kernel(const __grid_constant__ GradientArguments a) {
  const int64_t row = blockIdx.x / a.tiles;
  const int64_t n = row / a.experts;
  const int k = static_cast<int>(row % a.experts);
  const Tile tile(blockIdx.x % a.tiles, a.tiles, a.tile_columns, a.spec.vocab);
  const int64_t y = a.target[n], i = n * a.spec.experts + a.first + k;
  const bool ignored = y == a.spec.ignore_index;
  const bool known = !ignored && y >= 0 && y < a.spec.vocab;
  const float of_prob = a.grad[i], of_lse = a.grad_lse ? a.grad_lse[i] : 0.0f;
  const double lse = a.lse[i], temperature = a.spec.temperature;
  const bool zero = ignored || (known && of_prob == 0 && of_lse == 0);
  const bool computed = known && !zero && lse - lse == 0;

  const T* z[1] = {static_cast<const T*>(a.logits[k].data) + row_offset(a.logits[k], a.spec, n)};
  T* dz[1] = {static_cast<T*>(a.grads[k].data) + row_offset(a.grads[k], a.spec, n)};
  tile.fill(dz[0], computed, zero ? 0.0f : NAN, a.spec.vocab, a.padded_vocab[k]);
  if (!computed) return;

  const ColumnTransform transform{a.exponent.inner, a.spec.softcap > 0};
  const ExpertScalars s = expert_scalars(lse, lse, a.exponent, transform.cap);
  const float factor = static_cast<float>((of_lse - of_prob) / temperature);
  float at_target = 0.0f;
  if (y >= tile.begin && y < tile.end) {
    const double log_p = exact_u(to_float(z[0][y]), a.spec) * a.exponent.unit - lse;
    at_target = static_cast<float>(target_gradient(log_p, of_prob, of_lse) / temperature);
  }
  for_columns<1>(z, tile.begin, tile.end, transform, Upstream{nullptr, 0.0f},
                 GradientSink<1, T>{dz}, [&](int64_t v, const auto& u, float, const auto& emit) {
                   const float value =
                       v == y ? at_target : factor * ::exp2f(log2_prob(u(0), s, a.exponent.scale));
                   emit(0, value * transform.slope(u(0)));
                 });
}

}  // namespace

const char* launch_log_prob(const ExpertLogProb& op, const MixtureNLL* mixture, int device,
                            void* stream) {
  LogProbArguments a{{}, op.spec, Exponent(op.spec), op.target, nullptr, op.lse};
  a.log_prob = static_cast<float*>(op.log_prob);
  if (mixture) {
    a.gate = static_cast<const float*>(mixture->gate_logits);
    a.gate_stride = mixture->gate_stride;
    a.nll = static_cast<float*>(mixture->nll);
  }
  const int threads = streaming_threads(op.spec);
  a.team = streaming_team(op.spec, threads, DeviceLimits(device));
  const Grid grid{team_blocks(op.spec.rows, a.team), threads, a.team, sizeof(TeamMemory)};
  for (int64_t first = 0; first < op.spec.experts; first += kExpertsPerLaunch) {
    a.first = static_cast<int>(first);
    a.experts = static_cast<int>(::min(op.spec.experts - first, int64_t{kExpertsPerLaunch}));
    for (int k = 0; k < a.experts; ++k) a.logits[k] = op.logits[first + k];
    const char* error = for_dtype(op.spec.dtype, [&](auto zero) {
      return launch(expert_log_prob_kernel<decltype(zero)>, grid, stream, a);
    });
    if (error) return error;
  }
  return nullptr;
}

const char* expert_log_prob(const ExpertLogProb& op, int device, void* stream) {
  if (op.spec.rows == 0 || op.spec.experts == 0) return nullptr;
  return on_device(device, [&] { return launch_log_prob(op, nullptr, device, stream); });
}

const char* expert_log_prob_backward(const ExpertLogProbBackward& op, int device, void* stream) {
  if (op.spec.rows == 0 || op.spec.experts == 0) return nullptr;
  GradientArguments a{{}, {}, {}, op.spec, Exponent(op.spec), op.target, op.lse};
  a.grad = static_cast<const float*>(op.grad);
  a.grad_lse = static_cast<const float*>(op.grad_lse);
  return on_device(device, [&]() -> const char* {
    for (int64_t first = 0; first < op.spec.experts; first += kExpertsPerLaunch) {
      a.first = static_cast<int>(first);
      a.experts = static_cast<int>(::min(op.spec.experts - first, int64_t{kExpertsPerLaunch}));
      for (int k = 0; k < a.experts; ++k) {
        a.logits[k] = op.logits[first + k];
        a.grads[k] = op.grad_logits[first + k];
        a.padded_vocab[k] = op.padded_vocab[first + k];
      }
      a.tile_columns = tile_columns(op.spec, op.spec.rows * a.experts, device);
      a.tiles = Tile::count(op.spec.vocab, a.tile_columns);
      const Grid grid{op.spec.rows * a.experts * a.tiles, kTileThreads};
      const char* error = for_dtype(op.spec.dtype, [&](auto zero) {
        return launch(expert_log_prob_backward_kernel<decltype(zero)>, grid, stream, a);
      });
      if (error) return error;
    }
    return nullptr;
  });
}

}  // namespace robustgate::cuda
