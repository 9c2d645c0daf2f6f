"""Masks between heads: from KV heads to the query heads that share them, and of some heads alone."""

from collections.abc import Sequence

from pallas_kernels.masks import Mask, PerHead, per_head


def over_groups(masks: Sequence[Mask], num_heads: int) -> Mask:
    """One mask per KV head, for the query heads: head h belongs to KV head h // (num_heads / number of masks)."""
    return _one_or_each(masks, [h * len(masks) // num_heads for h in range(num_heads)])


def of_heads(mask: Mask, heads: Sequence[int]) -> Mask:
    """The mask of some of its heads, in their order."""
    if not isinstance(mask, PerHead):
        return mask
    return _one_or_each(mask.masks, [mask.heads[h] for h in heads])


def _one_or_each(masks: Sequence[Mask], heads: Sequence[int]) -> Mask:
    made = per_head(masks, heads)
    assert isinstance(made, PerHead)
    return made.masks[0] if len(made.masks) == 1 else made
