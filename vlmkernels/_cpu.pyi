# SPDX-License-Identifier: Apache-2.0
"""Types of the native module `_cpu` (csrc/bindings/cpu_module.cpp and the families' files beside it)."""

class Error(RuntimeError): ...
class InvalidValue(ValueError): ...

class ContrastiveCall:
    def __init__(
        self,
        *,
        q: tuple[int, int, int, int, int],
        k: tuple[int, int, int, int, int],
        batch: int,
        n: int,
        m: int,
        d: int,
        sigmoid: bool = False,
        columns: bool = False,
        bf16: bool = False,
        reduction: int = 0,
        scale: int,
        logit_bias: int = 0,
        smoothing: float = 0.0,
        positives: int = 0,
        ignores: bool = False,
        ignore_index: int = 0,
        row_labels: int = 0,
        col_labels: int = 0,
        key_mask: int = 0,
        key_bias: int = 0,
        loss: int = 0,
        row_lse: int = 0,
        col_lse: int = 0,
        saved: int = 0,
        grad_loss: int = 0,
        grad_q: int = 0,
        grad_k: int = 0,
        grad_q_bf16: int = 0,
        grad_k_bf16: int = 0,
        grad_scale: int = 0,
        grad_logit_bias: int = 0,
        grad_key_bias: int = 0,
        block: bool = False,
        row_classes: int = 0,
        col_classes: int = 0,
        row_share: int = 0,
        col_share: int = 0,
        row_weight: int = 0,
        col_weight: int = 0,
        row_stats: int = 0,
        col_stats: int = 0,
    ) -> None: ...
    def workspace(self, one_pass: bool, threads: int) -> int: ...

class TopkCall:
    def __init__(
        self,
        *,
        metric: int,
        n: int,
        d: int,
        k: int,
        q: tuple[int, int, int, int],
        segments: list[
            tuple[tuple[int, int, int, int], tuple[int, int, int, int], int, int, int, int, int, int, int]
        ],
        allowed: int = 0,
        mask: int = 0,
        mask_stride: int = 0,
        centre: int = 0,
        scores: int = 0,
        labels: int = 0,
        rescored: int = 0,
    ) -> None: ...
    def classify(self, logit_scale: int, dtype: int, lse: int) -> None: ...
    def workspace(self, threads: int) -> int: ...
    def range_workspace(self, threads: int) -> int: ...

class RangeResult:
    def __init__(self) -> None: ...
    def count(self) -> int: ...
    def copy(self, lims: int, scores: int, labels: int) -> None: ...

class LinearCall:
    def __init__(
        self,
        kind: int,
        x: tuple[int, int, int, int, int, int],
        m: int,
        n: int,
        k: int,
        group: int,
        packed: int,
        bias: int,
        bias_dtype: int,
        bias_stride: int,
        activation: int,
        residual: tuple[int, int, int, int, int, int],
        out: int,
        out_dtype: int,
        input_scale: int,
        scale_dtype: int,
    ) -> None: ...
    def set_weight(self, weight: tuple[int, int, int, int]) -> None: ...
    def workspace(self, threads: int) -> int: ...

class AttentionCall:
    def __init__(
        self,
        sizes: tuple[int, int, int, int, int, int, int],
        bf16: bool,
        causal: bool,
        scale: float,
        q: tuple[int, int, int, int, int],
        k: tuple[int, int, int, int, int],
        v: tuple[int, int, int, int, int],
        out: tuple[int, int, int, int, int],
        lse: tuple[int, int, int],
    ) -> None: ...
    def set_bias(
        self, data: int, bf16: bool, batch_stride: int, head_stride: int, row_stride: int, col_stride: int
    ) -> None: ...
    def set_key_mask(self, data: int, batch_stride: int, col_stride: int) -> None: ...
    def set_sequences(self, cu_q: int, cu_q_wide: bool, cu_k: int, cu_k_wide: bool) -> None: ...
    def set_dropout(self, seed: int, drop_below: int, keep_scale: float) -> None: ...
    def set_gradients(
        self,
        grad_out: tuple[int, int, int, int, int],
        grad_lse: tuple[int, int, int, int, int],
        grad_q: tuple[int, int, int, int, int],
        grad_k: tuple[int, int, int, int, int],
        grad_v: tuple[int, int, int, int, int],
        grad_bias: tuple[int, int, int],
    ) -> None: ...
    def workspace(self, backward: bool, threads: int) -> int: ...

class LinearGradients:
    def __init__(
        self,
        forward: LinearCall,
        grad_out: tuple[int, int, int, int, int, int],
        half: bool,
        weight: tuple[int, int, int, int],
        scale: int,
        zero_point: int,
        grad_x: int,
        grad_weight: int,
        grad_bias: int,
        dtype: int,
    ) -> None: ...
    def workspace(self, threads: int) -> int: ...

def isa() -> str: ...
def isa_levels() -> list[str]: ...
def cpu_brand() -> str: ...
def use_openmp(path: str) -> bool: ...
def openmp_path() -> str: ...
def ask_for_large_pages(data: int, bytes: int) -> None: ...
def forked_from_threads() -> bool: ...
def peak(kind: str, seconds: float, threads: int) -> float: ...
def engine_rate(kind: str, m: int, n: int, depth: int, seconds: float, threads: int) -> float: ...
def contrastive_forward(call: ContrastiveCall, workspace: int, threads: int) -> None: ...
def contrastive_block_statistics(call: ContrastiveCall, workspace: int, threads: int) -> None: ...
def contrastive_backward(call: ContrastiveCall, workspace: int, threads: int) -> None: ...
def contrastive_one_pass(call: ContrastiveCall, workspace: int, threads: int) -> None: ...
def topk_search(call: TopkCall, workspace: int, threads: int) -> None: ...
def topk_range(
    call: TopkCall, threshold: float, workspace: int, threads: int, result: RangeResult
) -> None: ...
def encode_codes(
    vectors: int,
    centre: int,
    n: int,
    d: int,
    codes: int,
    scale: int,
    norm: int,
    residual: int,
    threads: int,
) -> None: ...
def class_vectors_workspace(prompts: int, d: int, threads: int) -> int: ...
def class_vectors(
    prompts: tuple[int, int, int, int],
    classes: int,
    count: int,
    d: int,
    out: int,
    workspace: int,
    threads: int,
) -> None: ...
def topk_gradients_workspace(n: int, m: int, k: int) -> int: ...
def topk_gradients(
    *,
    metric: int,
    n: int,
    m: int,
    d: int,
    k: int,
    q: tuple[int, int, int, int],
    x: tuple[int, int, int, int],
    indices: int,
    grad_score: int,
    add: bool = False,
    grad_q: int = 0,
    grad_x: int = 0,
    grad_q_bf16: int = 0,
    grad_x_bf16: int = 0,
    logit_scale: int = 0,
    grad_scale: int = 0,
    workspace: int,
    threads: int,
) -> None: ...
def zero_shot_weights(
    *,
    n: int,
    d: int,
    k: int,
    logit_scale: int,
    probabilities: int,
    grad_probabilities: int,
    lse: int,
    grad_lse: int,
    row_lse: int,
    grad_score: int,
    row_weight: int,
    no_positives: int,
    zeros: int = 0,
) -> None: ...
def unit_gradients(
    *,
    x: tuple[int, int, int, int],
    rows: int,
    group: int,
    d: int,
    grad: int,
    out: int,
    out_bf16: int = 0,
    threads: int,
) -> None: ...
def packed_weight_bytes(kind: int, n: int, k: int, group: int) -> int: ...
def pack_weight(
    kind: int,
    codes: tuple[int, int, int, int],
    scale: int,
    zero_point: int,
    n: int,
    k: int,
    group: int,
    packed: int,
    threads: int,
) -> None: ...
def linear_forward(call: LinearCall, workspace: int, threads: int) -> None: ...
def attention_forward(call: AttentionCall, workspace: int, threads: int) -> None: ...
def attention_backward(call: AttentionCall, workspace: int, threads: int) -> None: ...
def linear_backward(call: LinearGradients, workspace: int, threads: int) -> None: ...
