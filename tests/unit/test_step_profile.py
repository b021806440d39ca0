"""The benchmark's profile of a step: what a device is busy with."""

import pytest
import torch
from step_profile import Span, covered, kind_of, shares, step_profile


def span(name: str, start: float, end: float) -> Span:
    return Span(name=name, start=start, end=end)


def test_overlapping_spans_count_once() -> None:
    assert covered([span("a", 0, 10), span("b", 5, 12), span("c", 6, 7), span("d", 20, 21)]) == 13


def test_shares_sum_to_one_with_the_idle_time() -> None:
    found = shares(
        [span("sm90_xmma_gemm_bf16", 0, 30), span("flash_fwd_kernel", 20, 30), span("vectorized_add", 90, 100)]
    )
    assert found["busy_share"] == 0.4
    parts = found["share_of_time"]
    assert parts["idle"] == 0.6
    assert parts["matrix products"] == 3 * parts["attention"] == 3 * parts["other"]
    assert sum(parts.values()) == pytest.approx(1)


def test_shares_are_of_the_time_without_the_profiler() -> None:
    spans = [span("sm90_xmma_gemm_bf16", 0, 30), span("vectorized_add", 490, 500)]
    found = shares(spans, 80)  # the host was slowed sixfold
    assert found["busy_share"] == found["share_of_time"]["idle"] == 0.5
    assert shares(spans, 30)["busy_share"] == 1


def test_a_trace_without_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match="no kernel"):
        shares([])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "matrix products"),
        ("cudnn::cnn::wgrad2d_grouped_direct_kernel<float>", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16>", "matrix products"),
        ("pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("aten::bmm", "matrix products"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("void at::native::RowwiseMomentsCUDAKernel<float>", "normalisation"),
        ("void at::native::(anonymous namespace)::GroupNormBackward", "normalisation"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::unrolled_elementwise_kernel<direct_copy_kernel_cuda>", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, silu_kernel>", "other"),
        ("aten::addmm", "matrix products"),
        ("aten::mkldnn_convolution", "matrix products"),
    ],
)
def test_kernels_are_known_by_name(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_a_real_step_is_mostly_matrix_products() -> None:
    a = torch.randn(400, 400, requires_grad=True)

    def run() -> None:
        for _ in range(5):
            (a @ a @ a).sum().backward()

    found = step_profile(run)
    assert 0.3 < found["busy_share"] <= 1
    parts = found["share_of_time"]
    assert parts["matrix products"] > parts["other"] + parts["copies"]
    assert parts["optimizer"] == parts["attention"] == 0
