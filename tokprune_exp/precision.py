"""Which arithmetic this machine does fast: the precision of training, and the library of fp32 products on the CPU."""

import torch


def resolve_precision(precision: str, accelerator: str = "auto") -> str:
    """Return what Lightning will train in: for `auto` bf16-mixed where the hardware multiplies bf16, else 32-true.

    16-mixed becomes bf16-mixed on a CPU. Lightning would exchange it there in any case, and a run has to record what is
    used.
    """
    if precision == "16-mixed" and resolve_accelerator(accelerator) == "cpu":
        return "bf16-mixed"
    if precision != "auto":
        return precision
    if torch.cuda.is_available() and accelerator != "cpu":
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    capabilities = torch.cpu.get_capabilities()
    return "bf16-mixed" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "32-true"


def resolve_accelerator(accelerator: str) -> str:
    """Return Lightning's accelerator for `auto`: the GPU where CUDA finds one, else the CPU."""
    if accelerator != "auto":
        return accelerator
    return "gpu" if torch.cuda.is_available() else "cpu"


def use_fast_exact_float32() -> bool:
    """Let fp32 products on the CPU run in oneDNN if they stay fp32 there; return whether they now do.

    On some CPUs PyTorch's default library reaches less than half of the speed of oneDNN, which it uses only when told
    that products may be less precise ("medium"). Whether they then are depends on the CPU, so it is measured: the error
    of one product must stay that of fp32 (bf16 is some hundred times worse), else the setting is taken back. With a GPU
    nothing is changed, since there the setting means something else.
    """
    if torch.cuda.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 384, generator=generator) for _ in range(2))
    exact = left.double() @ right.double().T
    before, errors = torch.get_float32_matmul_precision(), {}
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        errors[precision] = float((torch.nn.functional.linear(left, right).double() - exact).abs().max())
    is_exact = errors["medium"] <= 8 * errors["highest"]
    torch.set_float32_matmul_precision("medium" if is_exact else before)
    return is_exact
