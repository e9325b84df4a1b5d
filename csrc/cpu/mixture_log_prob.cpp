// Mixture log-probability: out[n] = sign * log sum_k softmax(a_n)_k exp(l[n, k]), and its
// gradients.
//
// Small data ([N, K]), so the cost is the exponentials: rows are taken in blocks whose N * K terms
// fit a stack buffer and one vector exp runs over the whole buffer. float64 uses libm.
// A weight of 0 (a = -inf) and an expert of probability 0 (l = -inf) contribute nothing; if nothing
// contributes the value is -sign * inf with gradient 0. NaN stays in its row.
// Parallelisation: the caller hands out blocks of rows.

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace robustgate {
namespace RG_ISA {
namespace {

constexpr int64_t kBuffer = 512;  // terms; one row is processed alone when K is larger

void exp_in_place(float* x, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store(x + i, exp2(load<Vec>(x + i) * kLog2E));
  }
  Vec tail = {};
  memcpy(&tail, x + i, (count - i) * sizeof(float));
  tail = exp2(tail * kLog2E);
  memcpy(x + i, &tail, (count - i) * sizeof(float));
}

void exp_in_place(double* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = ::exp(x[i]);
}

template <typename T>
T max_of(const T* x, int64_t count) {
  T m = x[0];
  for (int64_t i = 1; i < count; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

// Finite shift for exp(x - shift); 0 where the maximum is infinite or NaN, which then propagates.
template <typename T>
T finite_or_zero(T x) {
  return x - x == 0 ? x : (T)0;
}

// work[r, k] = exp(terms[r, k] - top[r]) with top[r] the row's maximum, or 0 where it is not
// finite.
template <typename T>
void exp_relative_to_max(const T* terms, T* work, T* top, int64_t rows, int64_t experts) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* t = terms + r * experts;
    top[r] = finite_or_zero(max_of(t, experts));
    for (int64_t k = 0; k < experts; ++k) work[r * experts + k] = t[k] - top[r];
  }
  exp_in_place(work, rows * experts);
}

template <typename T>
double row_sum(const T* work, int64_t r, int64_t experts) {
  double sum = 0;
  for (int64_t k = 0; k < experts; ++k) sum += work[r * experts + k];
  return sum;
}

// log_sum[r] = log sum_k exp(terms[r, k])
template <typename T>
void row_log_sum_exp(const T* terms, T* work, T* log_sum, int64_t rows, int64_t experts) {
  exp_relative_to_max(terms, work, log_sum, rows, experts);
  for (int64_t r = 0; r < rows; ++r) {
    log_sum[r] = (T)(log_sum[r] + ::log(row_sum(work, r, experts)));
  }
}

// Scratch for one block of rows: on the stack up to kBuffer terms, else one row of any K.
template <typename T>
struct Block {
  int64_t rows;  // rows per block
  T* log_gate;   // [rows, K]  log softmax of the gate
  T* terms;      // [rows, K]  log g + l
  T* work;       // [rows, K]
  T* row_value;  // [rows]
};

template <typename T, typename Body>
void for_each_block(const MixtureLogProb& op, int64_t begin, int64_t end, Body body) {
  const int64_t experts = op.experts;
  const auto run = [&](int64_t rows, T* scratch) {
    const int64_t size = rows * experts;
    Block<T> block{rows, scratch, scratch + size, scratch + 2 * size, scratch + 3 * size};
    const T* gate = (const T*)op.gate_logits;
    for (int64_t n = begin; n < end; n += block.rows) {
      const int64_t count = end - n < block.rows ? end - n : block.rows;
      if (op.gate_stride != 0 || n == begin) {
        // A shared gate is normalised once, into every row of the block.
        for (int64_t r = 0; r < count; ++r) {
          memcpy(block.terms + r * experts, gate + (n + r) * op.gate_stride, experts * sizeof(T));
        }
        exp_relative_to_max(block.terms, block.work, block.row_value, count, experts);
        for (int64_t r = 0; r < count; ++r) {
          // (a - top) - log sum: large gate logits lose nothing.
          const T log_sum = (T)::log(row_sum(block.work, r, experts));
          for (int64_t i = r * experts; i < (r + 1) * experts; ++i) {
            block.log_gate[i] = (block.terms[i] - block.row_value[r]) - log_sum;
          }
        }
      }
      const T* log_prob = (const T*)op.log_prob + n * experts;
      for (int64_t i = 0; i < count * experts; ++i) {
        block.terms[i] = block.log_gate[i] + log_prob[i];
      }
      body(block, n, count);
    }
  };
  if (experts <= kBuffer) {
    T scratch[4 * kBuffer];
    run(kBuffer / experts, scratch);
  } else {
    T* scratch = new T[3 * experts + 1];
    run(1, scratch);
    delete[] scratch;
  }
}

template <typename T>
void forward(const MixtureLogProb& op, int64_t begin, int64_t end) {
  T* out = (T*)op.out;
  for_each_block<T>(op, begin, end, [&](const Block<T>& block, int64_t n, int64_t count) {
    row_log_sum_exp(block.terms, block.work, block.row_value, count, op.experts);
    for (int64_t r = 0; r < count; ++r) {
      const bool ignored = op.target && op.target[n + r] == op.ignore_index;
      out[n + r] = ignored ? (T)0 : (T)op.sign * block.row_value[r];
    }
  });
}

template <typename T>
void backward(const MixtureLogProbBackward& op, int64_t begin, int64_t end) {
  const MixtureLogProb& fwd = op.forward;
  const int64_t experts = fwd.experts;
  for_each_block<T>(fwd, begin, end, [&](const Block<T>& block, int64_t n, int64_t count) {
    // Responsibilities are normalised by their own sum: the rounded value would cost its ulp.
    exp_relative_to_max(block.terms, block.work, block.row_value, count, experts);
    memcpy(block.terms, block.log_gate, count * experts * sizeof(T));
    exp_in_place(block.terms, count * experts);  // gate weights
    for (int64_t r = 0; r < count; ++r) {
      const T grad = ((const T*)op.grad)[n + r];
      const double sum = row_sum(block.work, r, experts);
      const bool ignored = fwd.target && fwd.target[n + r] == fwd.ignore_index;
      // Nothing contributes, or nothing is asked: the gradient is 0, not 0 / 0.
      const bool zero = ignored || grad == 0 || sum == 0;
      const T scale = (T)fwd.sign * grad;
      const T inverse = (T)(1 / sum);
      for (int64_t k = 0; k < experts; ++k) {
        const int64_t i = r * experts + k;
        const int64_t to = (n + r) * experts + k;
        const T share = block.work[i] * inverse;
        if (op.grad_log_prob) ((T*)op.grad_log_prob)[to] = zero ? (T)0 : scale * share;
        if (op.grad_gate_logits) {
          ((T*)op.grad_gate_logits)[to] = zero ? (T)0 : scale * (share - block.terms[i]);
        }
      }
    }
  });
}

}  // namespace

void mixture_log_prob(const MixtureLogProb& op, int64_t begin, int64_t end) {
  return op.dtype == DType::kFloat64 ? forward<double>(op, begin, end)
                                     : forward<float>(op, begin, end);
}

void mixture_log_prob_backward(const MixtureLogProbBackward& op, int64_t begin, int64_t end) {
  return op.forward.dtype == DType::kFloat64 ? backward<double>(op, begin, end)
                                             : backward<float>(op, begin, end);
}

}  // namespace RG_ISA
}  // namespace robustgate
