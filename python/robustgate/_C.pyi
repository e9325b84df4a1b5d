"""Compiled kernels. Private: tensors arrive as addresses, checked by robustgate.ops.backends."""

from collections.abc import Sequence

# (data pointer, outer stride, inner stride) of each expert, flat.
_Rows = Sequence[int]
# (rows, inner_rows, vocab, ignore_index, temperature, softcap or 0, dtype code)
_Spec = tuple[int, int, int, int, float, float, int]
# (rows, experts, gate_stride, ignore_index, sign, dtype code)
_MixtureSpec = tuple[int, int, int, int, float, int]

# (address, row stride) of gate logits or weights: stride 0 for [K], K for [N, K]
_PerRow = tuple[int, int]

# (-1, threads) on the CPU, else (CUDA device, stream)
_Where = tuple[int, int]

cuda_version: int | None

def instruction_set() -> str: ...

# The two below return the first row whose target is out of range, or -1.
def expert_log_prob(
    logits: _Rows, target: int, log_prob: int, lse: int, spec: _Spec, where: _Where, /
) -> int: ...
def mixture_nll(
    logits: _Rows,
    gate_logits: int,
    gate_stride: int,
    target: int,
    nll: int,
    log_prob: int,
    lse: int,
    spec: _Spec,
    where: _Where,
    /,
) -> int: ...
def expert_log_prob_backward(
    logits: _Rows,
    target: int,
    lse: int,
    grad: int,
    grad_lse: int,
    grad_logits: _Rows,
    padded_vocab: Sequence[int],
    spec: _Spec,
    where: _Where,
    /,
) -> None: ...
def mixture_log_prob(
    log_prob: int, gate_logits: int, target: int, out: int, spec: _MixtureSpec, where: _Where, /
) -> None: ...
def mixture_log_prob_backward(
    log_prob: int,
    gate_logits: int,
    target: int,
    grad: int,
    grad_log_prob: int,
    grad_gate_logits: int,
    spec: _MixtureSpec,
    where: _Where,
    /,
) -> None: ...

# A gradient whose data pointer is 0 is not asked for; elsewhere 0 stands for an optional tensor
# that is not there.
def jsd(
    logits: _Rows,
    weights: _PerRow,
    target: int,
    given_lse: int,
    value: int,
    kl: int,
    lse: int,
    spec: _Spec,
    where: _Where,
    /,
) -> None: ...
def jsd_backward(
    logits: _Rows,
    weights: _PerRow,
    target: int,
    lse: int,
    kl: int,
    grad: int,
    grad_logits: _Rows,
    padded_vocab: Sequence[int],
    spec: _Spec,
    where: _Where,
    /,
) -> None: ...
def mixture_kl(
    logits: _Rows,
    teacher: _PerRow,
    student: _PerRow,
    target: int,
    value: int,
    tilt: int,
    lse: int,
    spec: _Spec,
    where: _Where,
    /,
) -> None: ...
def mixture_kl_backward(
    logits: _Rows,
    teacher: _PerRow,
    student: _PerRow,
    target: int,
    value: int,
    lse: int,
    grad: int,
    grad_logits: _Rows,
    padded_vocab: Sequence[int],
    spec: _Spec,
    where: _Where,
    /,
) -> None: ...
def mixture_log_softmax(
    logits: _Rows,
    gate: _PerRow,
    target: int,
    log_mixture: int,
    mean: int,
    share: int,
    lse: int,
    spec: _Spec,
    where: _Where,
    /,
) -> None: ...
def mixture_log_softmax_backward(
    logits: _Rows,
    gate: _PerRow,
    target: int,
    lse: int,
    grad: int,
    grad_per_row: bool,
    grad_gate_logits: int,
    grad_logits: _Rows,
    padded_vocab: Sequence[int],
    spec: _Spec,
    where: _Where,
    /,
) -> None: ...
def cuda_why_unusable(device: int, /) -> str | None: ...
