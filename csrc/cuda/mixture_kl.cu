// KL between two gated mixtures of the same experts: sum_v m_g log(m_g / m_gamma), g the teacher's
// gate, gamma the student's; and tilt_k = gamma_k E_{p_k}[t], t = m_g / m_gamma - 1, for the
// student's gradient.
//
// Forward: a team of blocks per row (row_team.cuh), the rows of all experts on chip where they fit
// (expert_rows.cuh). Two passes: log-sum-exps; then both mixtures of a column and their logarithms.
// A row that comes out below 1/32 nats, or with a student's weight below 1e-6, is compared once
// more without cancellation (common/mixture_kl_column.h), and where experts are nearly equal their
// log-sum-exps are corrected and the row is done again.
// Backward: balance_k = sum_v pull_k first, pull_k = p_k (g_k log(1 + t) - gamma_k t), then
// dz_k = grad (pull_k - p_k balance_k) dz'/dz: two passes over rows on chip and one write.

#include "common/mixture_kl_column.h"
#include "cuda/expert_rows.cuh"
#include "cuda/mixture_row.cuh"

namespace robustgate::cuda {
namespace {

struct Arguments {
  RowsArguments rows;
  const float* teacher;  // [N, K] or [K]
  int64_t teacher_stride;
  const float* student;  // [N, K] or [K]
  int64_t student_stride;
  const int64_t* target;  // [N] or null
  float* value;           // [N]
  float* tilt;            // [N, K]; forward only
  double* lse;            // [N, K]
};

constexpr int kGroup = 4;  // experts whose sums a thread keeps at a time

// gate[0..4]: g, gamma, g - gamma, log2 g, log2 gamma of row n, by the first warp.
template <typename T>
__device__ void load_gates(const Arguments& a, int64_t n, RowsMemory<T>& m) {
  if (threadIdx.x >= 32) return;
  const int k = threadIdx.x;
  const bool counts = k < a.rows.spec.experts;
  const double g = softmax_of_lanes(counts ? a.teacher[n * a.teacher_stride + k] : -INFINITY);
  const double gamma = softmax_of_lanes(counts ? a.student[n * a.student_stride + k] : -INFINITY);
  if (!counts) return;
  m.gate[0][k] = static_cast<float>(g);
  m.gate[1][k] = static_cast<float>(gamma);
  m.gate[2][k] = static_cast<float>(g - gamma);
  m.gate[3][k] = static_cast<float>(::log2(g));
  m.gate[4][k] = static_cast<float>(::log2(gamma));
}

// Whether log-sum-exps and gates are finite.
template <typename T>
__device__ bool is_finite(const RowsMemory<T>& m) {
  return m.finite && m.gate[0][0] == m.gate[0][0] && m.gate[1][0] == m.gate[1][0];
}

template <typename T>
__device__ bool student_counts_all(int experts, const RowsMemory<T>& m) {
  bool all = true;
  for (int k = 0; k < experts; ++k) all = all && m.gate[1][k] >= kSmallestWeight;
  return all;
}

// Both mixtures of one column, of experts that are clearly apart.
struct Mixtures {
  float teacher, student;

  template <typename U, typename Scalars, typename Gate>
  __device__ Mixtures(int experts, const U& u, const Scalars& scalars, const Gate& of_teacher,
                      const Gate& of_student, float scale)
      : teacher(0.0f), student(kTiny) {
#pragma unroll
    for (int k = 0; k < experts; ++k) {
      const float p = ::exp2f(log2_prob(u(k), scalars[k], scale));
      teacher += of_teacher[k] * p;
      student += of_student[k] * p;
    }
  }
  __device__ float ratio() const { return teacher / student; }
  __device__ float log2_ratio() const {
    return __log2f(::fmaxf(teacher, kTiny)) - __log2f(student);
  }
};

// totals[0][k] = tilt_k; returns the KL.
template <int kExperts, typename T>
__device__ double compare_sums(const Arguments& a, int64_t begin, int64_t end, Team& team,
                               RowsMemory<T>& m) {
  const int experts = kExperts ? kExperts : static_cast<int>(a.rows.spec.experts);
  const ColumnTransform transform{a.rows.exponent.inner, a.rows.spec.softcap > 0};
  const float scale = a.rows.exponent.scale;
  const PerExpert<kExperts, ExpertScalars> scalars(m.scalars);
  const PerExpert<kExperts, float> teacher(m.gate[0]), student(m.gate[1]);
  double value = 0;
  for (int first = 0; first < experts; first += kGroup) {
    float sum = 0.0f, tilt[kGroup] = {};
    for_columns<kExperts>(
        m.row, begin, end, transform, Upstream{nullptr, 0.0f}, NoSink(),
        [&](int64_t, const auto& u, float, const auto&) {
          const Mixtures mixtures(experts, u, scalars, teacher, student, scale);
          const float ratio = mixtures.ratio();
          sum += mixtures.teacher * mixtures.log2_ratio();
#pragma unroll
          for (int i = 0; i < kGroup; ++i) {
            if (first + i >= experts) break;
            tilt[i] += ::exp2f(log2_prob(u(first + i), scalars[first + i], scale)) * ratio;
          }
        });
#pragma unroll
    for (int i = 0; i < kGroup; ++i) team.put(i, Sum{tilt[i]});
    team.put(kGroup, Sum{sum});
    const Sum* totals = team.merge_all<Sum>(kGroup + 1);
    value = totals[kGroup].value / kLog2EDouble;
    const int i = threadIdx.x;
    if (i < kGroup && first + i < experts) {
      m.totals[0][first + i] = m.gate[1][first + i] * (totals[i].value - 1.0);
    }
  }
  return value;
}

// The same without cancellation. Corrects lse where experts are nearly equal.
template <typename T>
__device__ double compare_columns(const Arguments& a, int64_t begin, int64_t end, Team& team,
                                  RowsMemory<T>& m) {
  const int experts = static_cast<int>(a.rows.spec.experts);
  const Exponent& e = a.rows.exponent;
  const ColumnTransform transform{e.inner, a.rows.spec.softcap > 0};
  double value = 0;
  for (int attempt = 0; attempt < 2; ++attempt) {
    double distance = 0;
    for (int first = 0; first < experts; first += kGroup) {
      float sum = 0.0f, squared = 0.0f, tilt[kGroup] = {}, error[kGroup] = {};
      for (int64_t v = begin + threadIdx.x; v < end; v += blockDim.x) {
        const StagedColumn<T> column{m, transform, experts, v};
        const KLColumn r = kl_column(column, e);
        sum += kl_value(r);
        squared += r.distance;
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          if (first + i >= experts) break;
          const KLSums sums = kl_sums(column, r, first + i, e);
          tilt[i] += sums.tilt;
          error[i] += sums.error;
        }
      }
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        team.put(i, Sum{tilt[i]});
        team.put(kGroup + i, Sum{error[i]});
      }
      team.put(2 * kGroup, Sum{sum});
      team.put(2 * kGroup + 1, Sum{squared});
      const Sum* sums = team.merge_all<Sum>(2 * kGroup + 2);
      value = sums[2 * kGroup].value < 0 ? 0.0 : sums[2 * kGroup].value;  // rounding
      distance = sums[2 * kGroup + 1].value;
      const int i = threadIdx.x;
      if (i < kGroup && first + i < experts) {
        const float gamma = m.gate[1][first + i];
        const bool counts = gamma > 0 && static_cast<float>(value) != INFINITY;
        m.totals[0][first + i] = counts ? gamma * sums[i].value : 0.0;
        m.totals[1][first + i] = sums[kGroup + i].value;
      }
    }
    __syncthreads();
    if (attempt > 0 || !correct_log_sum_exps(experts, distance, m.totals[1], m)) break;
    relate_experts(a.rows.spec, e, m.gate[1], m);
  }
  return value;
}

template <typename T, int kExperts>
__global__ void __launch_bounds__(kRowThreads, 2)
    mixture_kl_kernel(const __grid_constant__ Arguments a) {
  RG_SHARED_MEMORY(bytes);
  auto& m = *reinterpret_cast<RowsMemory<T>*>(bytes);
  const LogitsSpec& spec = a.rows.spec;
  Team team(m.team, a.rows.team, a.rows.exponent.scale);
  const int64_t begin = team.begin(spec.vocab), end = team.end(spec.vocab);
  const int k = threadIdx.x, experts = static_cast<int>(spec.experts);
  for (int64_t n = team.first_row(); n < spec.rows; n += team.row_step()) {
    const bool ignored = a.target && a.target[n] == spec.ignore_index;
    double value = 0;
    if (!ignored) {
      stage_rows(a.rows, n, begin, end, m);
      load_gates(a, n, m);
      log_sum_exps(a.rows, begin, end, team, m);
      relate_experts(spec, a.rows.exponent, m.gate[1], m);
      if (is_finite(m)) {
        if (student_counts_all(experts, m)) {
          value = compare_sums<kExperts>(a, begin, end, team, m);
        }
        if (!(value >= kApart)) value = compare_columns(a, begin, end, team, m);
      }
      __syncthreads();
    }
    if (!team.leading_warp()) continue;
    const bool known = !ignored && is_finite(m);
    if (k < experts) {
      a.lse[n * experts + k] = ignored ? 0.0 : m.lse[k];
      a.tilt[n * experts + k] = ignored ? 0.0f : known ? static_cast<float>(m.totals[0][k]) : NAN;
    }
    if (k == 0) a.value[n] = ignored ? 0.0f : known ? static_cast<float>(value) : NAN;
  }
  team.leave();
}

struct BackwardArguments {
  Arguments forward;
  GradientRows grads;
  const float* grad;  // [N]
};

// totals[0][k] = balance_k of a row whose mixtures are clearly apart; false where one is too small.
template <int kExperts, typename T>
__device__ bool balance_of_sums(const Arguments& a, int64_t begin, int64_t end, Team& team,
                                RowsMemory<T>& m) {
  const int experts = kExperts ? kExperts : static_cast<int>(a.rows.spec.experts);
  const ColumnTransform transform{a.rows.exponent.inner, a.rows.spec.softcap > 0};
  const float scale = a.rows.exponent.scale;
  const PerExpert<kExperts, ExpertScalars> scalars(m.scalars);
  const PerExpert<kExperts, float> teacher(m.gate[0]), student(m.gate[1]);
  for (int first = 0; first < experts; first += kGroup) {
    float pull[kGroup] = {}, small = 0.0f;
    for_columns<kExperts>(
        m.row, begin, end, transform, Upstream{nullptr, 0.0f}, NoSink(),
        [&](int64_t, const auto& u, float, const auto&) {
          const Mixtures mixtures(experts, u, scalars, teacher, student, scale);
          const float t = mixtures.ratio() - 1.0f, log_ratio = mixtures.log2_ratio() * kLn2;
          if (mixtures.student < kSmallestMixture) small = 1.0f;
#pragma unroll
          for (int i = 0; i < kGroup; ++i) {
            if (first + i >= experts) break;
            const float p = ::exp2f(log2_prob(u(first + i), scalars[first + i], scale));
            pull[i] += p * (teacher[first + i] * log_ratio - student[first + i] * t);
          }
        });
#pragma unroll
    for (int i = 0; i < kGroup; ++i) team.put(i, Sum{pull[i]});
    team.put(kGroup, Sum{small});
    const Sum* totals = team.merge_all<Sum>(kGroup + 1);
    if (totals[kGroup].value != 0) return false;
    const int i = threadIdx.x;
    if (i < kGroup && first + i < experts) m.totals[0][first + i] = totals[i].value;
  }
  __syncthreads();
  return true;
}

template <typename T>
__device__ void balance_of_columns(const Arguments& a, int64_t begin, int64_t end, Team& team,
                                   RowsMemory<T>& m) {
  const int experts = static_cast<int>(a.rows.spec.experts);
  const ColumnTransform transform{a.rows.exponent.inner, a.rows.spec.softcap > 0};
  for (int first = 0; first < experts; first += kGroup) {
    float pull[kGroup] = {};
    for (int64_t v = begin + threadIdx.x; v < end; v += blockDim.x) {
      const StagedColumn<T> column{m, transform, experts, v};
      const KLColumn r = kl_column(column, a.rows.exponent);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (first + i < experts) pull[i] += kl_pull(column, r, first + i, a.rows.exponent).pull;
      }
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) team.put(i, Sum{pull[i]});
    const Sum* totals = team.merge_all<Sum>(kGroup);
    const int i = threadIdx.x;
    if (i < kGroup && first + i < experts) m.totals[0][first + i] = totals[i].value;
  }
  __syncthreads();
}

template <typename T, int kExperts>
__global__ void __launch_bounds__(kRowThreads, 2)
    mixture_kl_backward_kernel(const __grid_constant__ BackwardArguments b) {
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
    const float forward = a.value[n], grad = ignored || forward == INFINITY ? 0.0f : b.grad[n];
    bool computed = grad != 0;
    if (computed) {
      stage_rows(a.rows, n, tile.begin, tile.end, m);
      load_gates(a, n, m);
      if (k < experts) m.lse[k] = a.lse[n * experts + k];
      relate_experts(spec, e, m.gate[1], m);
      computed = is_finite(m);
    }
    start_gradients(b.grads, spec, n, tile, computed, grad == 0 ? 0.0f : NAN, m);
    __syncthreads();
    if (!computed) continue;
    const float scaled = static_cast<float>(grad / spec.temperature);
    if (forward >= kApart && student_counts_all(experts, m) &&
        balance_of_sums<kExperts>(a, tile.begin, tile.end, team, m)) {
      const PerExpert<kExperts, ExpertScalars> scalars(m.scalars);
      const PerExpert<kExperts, float> teacher(m.gate[0]), student(m.gate[1]);
      const PerExpert<kExperts, double> balance(m.totals[0]);
      for_columns<kExperts>(
          m.row, tile.begin, tile.end, transform, Upstream{nullptr, 0.0f},
          GradientSink<kExperts, T>{m.grad}, [&](int64_t, const auto& u, float, const auto& emit) {
            const Mixtures mixtures(experts, u, scalars, teacher, student, e.scale);
            const float t = mixtures.ratio() - 1.0f, log_ratio = mixtures.log2_ratio() * kLn2;
#pragma unroll
            for (int i = 0; i < experts; ++i) {
              const float p = ::exp2f(log2_prob(u(i), scalars[i], e.scale));
              const float pull = teacher[i] * log_ratio - student[i] * t;
              emit(i, scaled * p * (pull - static_cast<float>(balance[i])) * transform.slope(u(i)));
            }
          });
      continue;
    }
    balance_of_columns(a, tile.begin, tile.end, team, m);
    for (int64_t v = tile.begin + threadIdx.x; v < tile.end; v += blockDim.x) {
      const StagedColumn<T> column{m, transform, experts, v};
      const KLColumn r = kl_column(column, e);
      for (int i = 0; i < experts; ++i) {
        if (m.grad[i] == nullptr) continue;
        const KLPull pull = kl_pull(column, r, i, e);
        const float dz = scaled * (pull.pull - pull.p * static_cast<float>(m.totals[0][i]));
        m.grad[i][v] = from_float<T>(dz * transform.slope(column.u(i)));
      }
    }
  }
  team.leave();
}

Arguments arguments(const MixtureKL& op) {
  return {rows_arguments(op.spec, op.logits),
          op.teacher_logits,
          op.teacher_stride,
          op.student_logits,
          op.student_stride,
          op.target,
          op.value,
          op.tilt,
          op.lse};
}

}  // namespace

const char* mixture_kl(const MixtureKL& op, int device, void* stream) {
  if (op.spec.rows == 0) return nullptr;
  Arguments a = arguments(op);
  return on_device(device, [&] {
    return for_experts(op.spec, [&](auto zero, auto experts) {
      using T = decltype(zero);
      const Grid grid = plan_rows(a.rows, sizeof(RowsMemory<T>), device);
      return launch(mixture_kl_kernel<T, decltype(experts)::value>, grid, stream, a);
    });
  });
}

const char* mixture_kl_backward(const MixtureKLBackward& op, int device, void* stream) {
  const LogitsSpec& spec = op.forward.spec;
  if (spec.rows == 0) return nullptr;
  BackwardArguments b{arguments(op.forward), gradient_rows(spec, op.grad_logits, op.padded_vocab),
                      op.grad};
  return on_device(device, [&] {
    return for_experts(spec, [&](auto zero, auto experts) {
      using T = decltype(zero);
      const Grid grid = plan_rows(b.forward.rows, sizeof(RowsMemory<T>), device);
      return launch(mixture_kl_backward_kernel<T, decltype(experts)::value>, grid, stream, b);
    });
  });
}

}  // namespace robustgate::cuda
