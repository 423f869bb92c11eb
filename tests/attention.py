"""What PyTorch's `varlen_attn` computes, by its documentation, on any device and in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
) -> Tensor:
    """Sequence by sequence in rows of their own: T_q queries, and as many keys as `seqused_k` says from `cu_seq_k` on.

    A sequence's last query stands at its last key, and none sees a key behind its own. As in a captured graph, only
    shapes and the two bounds decide what is computed; what the bounds cut off is a mistake of the caller.
    """
    assert window_size == (-1, 0) and enable_gqa
    assert all(numbers.dtype == torch.int32 for numbers in (cu_seq_q, cu_seq_k, seqused_k))
    sequences = len(seqused_k)
    assert len(cu_seq_q) == len(cu_seq_k) == sequences + 1
    device, rows = query.device, torch.arange(len(query), device=query.device)
    own = torch.searchsorted(cu_seq_q[1:].long(), rows, right=True).clamp(max=sequences - 1)
    place = seqused_k[own] - cu_seq_q[own + 1] + rows  # of each query among its sequence's keys
    columns = torch.arange(max_k, device=device)
    where = (cu_seq_k[own][:, None] + columns).clamp(max=len(key) - 1)
    seen = (columns <= place[:, None]) & (columns < seqused_k[own][:, None])
    groups = query.shape[1] // key.shape[1]
    keys, values = (
        torch.where(seen[:, :, None, None], cache[where], 0.0).repeat_interleave(groups, 2) for cache in (key, value)
    )
    scores = torch.einsum("nqh,ntqh->nqt", query.float(), keys.float()) * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return torch.einsum("nqt,ntqh->nqh", weights, values.float()).to(query.dtype)
