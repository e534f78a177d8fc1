"""The one error budget of the attention tests, and the plain attention that it is measured with."""

import torch
from torch import Tensor


def assert_within_budget(ours: Tensor, eager: Tensor, oracle: Tensor, factor: int = 2, what: str = "out") -> None:
    """Ours errs by at most `factor` times what eager PyTorch errs in the same dtype, and a few roundings.

    error(ours) ≤ factor · error(eager) + 4 · eps(dtype) · max|oracle|, errors being the largest absolute ones.

    In float64 eager PyTorch would be its own oracle and err by nothing: there it runs in float32, on inputs that
    float32 holds exactly, and its error counts times eps(float64) / eps(float32).

    Args:
        ours: what is tested.
        eager: plain matmuls and softmax with a dense mask, in the dtype of `ours` (float32 for float64).
        oracle: the same in float64.
        factor: 2 for outputs, 3 for gradients.
        what: the name of the tensor in the message.
    """
    assert eager.dtype == eager_dtype(ours.dtype), f"{what}: {ours.dtype} is compared with eager {eager.dtype}"
    assert oracle.dtype == torch.float64, f"{what}: the oracle is {oracle.dtype}"
    assert ours.shape == eager.shape == oracle.shape, f"{what}: shapes {ours.shape}, {eager.shape}, {oracle.shape}"
    error, eager_error = (float((states.double() - oracle).abs().amax()) for states in (ours, eager))
    eager_error *= torch.finfo(ours.dtype).eps / torch.finfo(eager.dtype).eps
    budget = factor * eager_error + 4 * torch.finfo(ours.dtype).eps * float(oracle.abs().amax())
    assert error <= budget, f"{what}: error {error:.2e}, budget {budget:.2e} (eager PyTorch {eager_error:.2e})"


def eager_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which eager PyTorch is measured for a result of `dtype`."""
    return torch.float32 if dtype == torch.float64 else dtype


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention as a textbook has it, a row and a head at a time, all in the dtype of the inputs.

    Args:
        query: [B, H, S, D].
        key: [B, K, S, D].
        value: [B, K, S, V].
        mask: bool [B, S, S], True where a query may attend.
        scale: of the scores.
        softcap: c · tanh(score / c).
        sinks: [H], a logit without a value in every softmax.

    Returns:
        [B, H, S, V].
    """
    batch, num_heads = query.shape[:2]
    group = num_heads // key.shape[1]
    rows = []
    for b in range(batch):
        heads = []
        for h in range(num_heads):
            scores = query[b, h] @ key[b, h // group].T * scale
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            scores = torch.where(mask[b], scores, -torch.inf)
            if sinks is not None:
                scores = torch.cat((scores, sinks[h].to(scores.dtype).expand(len(scores), 1)), dim=1)
            weights = torch.softmax(scores, dim=1)[:, : mask.shape[-1]]
            heads.append(weights @ value[b, h // group])
        rows.append(torch.stack(heads))
    return torch.stack(rows)
