# SPDX-License-Identifier: Apache-2.0
"""Types of the native module `_cuda` (csrc/bindings/cuda_module.cpp and the families' files beside it)."""

class Error(RuntimeError): ...
class InvalidValue(ValueError): ...

class DeviceProperties:
    @property
    def name(self) -> str: ...
    @property
    def capability(self) -> tuple[int, int]: ...
    @property
    def memory_bytes(self) -> int: ...
    @property
    def multiprocessors(self) -> int: ...
    @property
    def shared_bytes_per_block(self) -> int: ...

class AttentionCall:
    def __init__(
        self,
        sizes: tuple[int, int, int, int, int, int],
        bf16: bool,
        causal: bool,
        scale: float,
        q: tuple[int, int, int, int],
        k: tuple[int, int, int, int],
        v: tuple[int, int, int, int],
        out: tuple[int, int, int, int],
        lse: int,
    ) -> None: ...
    def set_bias(
        self, data: int, is_float: bool, batch_stride: int, head_stride: int, row_stride: int, col_stride: int
    ) -> None: ...
    def set_key_mask(self, data: int, batch_stride: int, col_stride: int) -> None: ...
    def set_dropout(self, seed: int, drop_below: int, keep_scale: float) -> None: ...
    def set_gradients(
        self,
        grad_out: tuple[int, int, int, int],
        grad_lse: tuple[int, int, int, int],
        grad_q: tuple[int, int, int, int],
        grad_k: tuple[int, int, int, int],
        grad_v: tuple[int, int, int, int],
        row_dots: int,
    ) -> None: ...
    def plan(self, backward: bool, most_shared: int) -> list[tuple[int, int, int, int, int]]: ...

class ContrastiveCall:
    def __init__(
        self,
        q: int,
        k: int,
        n: int,
        m: int,
        row_bytes: int,
        bf16: bool,
        scale: int,
        bias: int,
        key_bias: int,
        positives: int,
        columns: bool,
    ) -> None: ...
    def set_softmax(
        self,
        row_lse: int,
        col_lse: int,
        row_weight: int,
        col_weight: int,
        row_smoothing: float,
        col_smoothing: float,
        hard: float,
    ) -> None: ...

def contrastive_tile() -> int: ...
def contrastive_statistics(
    call: ContrastiveCall,
    range: tuple[int, int, int, int],
    totals: bool,
    row_parts: int,
    col_parts: int,
    row_target: int,
    col_target: int,
    device: int,
    stream: int,
) -> None: ...
def contrastive_gradients(
    call: ContrastiveCall,
    range: tuple[int, int, int, int],
    sigmoid: bool,
    tile: int,
    tile_stride: int,
    numbers: int,
    key_parts: int,
    device: int,
    stream: int,
) -> None: ...

class QuantizedLinearCall:
    def __init__(
        self,
        m: int,
        n: int,
        k_bytes: int,
        codes: int,
        row_scale: int,
        weight: int,
        weight_scale: int,
        bias: tuple[int, int, int],
        activation: int,
        residual: tuple[int, int, int],
        out: int,
        out_dtype: int,
    ) -> None: ...
    def plan(self) -> tuple[int, int, bool]: ...

def quantize_rows(
    m: int,
    k: int,
    x: tuple[int, int, int],
    input_scale: int,
    codes: int,
    code_stride: int,
    scale: int,
    device: int,
    stream: int,
) -> None: ...
def quantized_linear(call: QuantizedLinearCall, device: int, stream: int) -> None: ...
def topk_scan(
    queries: int,
    database: int,
    n: int,
    m: int,
    row_bytes: int,
    bf16: bool,
    slack: int,
    limit: int,
    scale: int,
    shift: int,
    reach: int,
    candidates: int,
    capacity: int,
    counts: int,
    device: int,
    stream: int,
) -> None: ...
def attention_forward(call: AttentionCall, device: int, stream: int) -> None: ...
def attention_backward(call: AttentionCall, device: int, stream: int) -> None: ...
def architectures() -> list[str]: ...
def runtime_version() -> tuple[int, int]: ...
def driver_version() -> tuple[int, int]: ...
def devices() -> tuple[int, str]: ...
def device_properties(index: int) -> DeviceProperties: ...
def launch_pattern(out: int, count: int, seed: int, device: int, stream: int) -> None: ...
