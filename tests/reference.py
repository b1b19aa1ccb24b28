# SPDX-License-Identifier: Apache-2.0
"""The slow reference: the same model on the full sequence, layer by layer, dropped tokens hidden by a mask, no cache.

What each layer shows is read off the ledger of a compressed run: which tokens its frame held, and, where the cache was
cleared later, which of them later tokens still see. Everything is in slots of the first frame, so that methods which
merge or reorder before the language model fit too; nothing here shortens a tensor behind that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmcompress.adapters.base import adapter_for


def shown(ledger) -> list[Tensor]:
    """[B, S'] bool per decoder layer: slots of the first frame that the layer's own frame held."""
    first = ledger.frames[0]
    columns = 1 + max(int(first.index.max()), int(ledger.layout.column.max()))
    masks = []
    for layer in range(ledger.n_layers):
        frame = ledger.frame_at(layer)
        real = real_slots(frame)
        alive = torch.zeros(len(real), columns, dtype=torch.bool).scatter(1, frame.index, real)
        masks.append(alive.gather(1, first.index) & real_slots(first))
    return masks


def real_slots(frame) -> Tensor:
    """[B, S_f] bool: slots that are not padding."""
    return torch.ones_like(frame.index, dtype=torch.bool) if frame.valid is None else frame.valid


def cleared(masks: list[Tensor], first: int) -> list[Tensor]:
    """What tokens behind the prompt see of it when layers from ``first`` on keep only what reached the last layer."""
    return [mask if layer < first else mask & masks[-1] for layer, mask in enumerate(masks)]


def embeddings(model, inputs: dict) -> Tensor:
    """[B, S, D] embeddings of the prompt, all visual tokens in place. Call it before the model is compressed."""
    ids = inputs["input_ids"]
    embeds = model.get_input_embeddings()(ids)
    if "pixel_values" not in inputs:
        return embeds
    features = torch.cat(list(model.model.get_image_features(inputs["pixel_values"]).pooler_output))
    return embeds.masked_scatter((ids == model.config.image_token_id)[..., None], features.to(embeds.dtype))


def entering(model, call) -> Tensor:
    """[B, S', D] what enters the first decoder layer while ``call()`` runs: merged and reordered tokens included."""
    seen = []

    def note(module, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    hook = adapter_for(model).decoder_layers[0].register_forward_pre_hook(note, with_kwargs=True)
    try:
        call()
    finally:
        hook.remove()
    return seen[0]


def reference(
    model, embeds: Tensor, masks: list[Tensor], valid: Tensor, base: Tensor, *, policy: str,
    later: Tensor | None = None, later_masks: list[Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Logits [B, S + T, vocab] of the prompt ``embeds`` [B, S, D] followed by the tokens ``later`` [B, T].

    ``masks``: see :func:`shown`; ``later_masks``: what ``later`` sees of the prompt (default: the same); ``valid``
    [B, S]: real slots; ``base`` [B, S]: positions in the first frame; ``policy``: "original" or "contiguous" for the
    cuts behind it. Rows of hidden tokens are meaningless.
    """
    later_masks = masks if later_masks is None else later_masks
    steps = 0 if later is None else later.shape[1]
    batch, columns = valid.shape
    hidden = embeds
    if later is not None:
        hidden = torch.cat([embeds, model.get_input_embeddings()(later)], dim=1)
    length = columns + steps
    ones = torch.ones(batch, steps, dtype=torch.bool)
    positions = torch.cat([base, base[:, -1:] + 1 + torch.arange(steps)], dim=1)
    text = adapter_for(model).language_model
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    for mask, later_mask, layer in zip(masks, later_masks, text.layers, strict=True):
        keys = torch.cat([mask & valid, ones], 1)[:, None].expand(-1, columns, -1)
        if steps:
            behind = torch.cat([later_mask & valid, ones], 1)[:, None].expand(-1, steps, -1)
            keys = torch.cat([keys, behind], 1)
        # a hidden token still sees itself, so that no row is empty
        seen = (keys & causal) | torch.eye(length, dtype=torch.bool)
        additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(hidden.dtype).min)[:, None]
        here = positions
        if policy == "contiguous":
            gone = torch.cat([valid & ~mask, ~ones], 1).long()
            here = positions - (gone.cumsum(1) - gone)
        kind = text.config._attn_implementation
        layer_mask = seen[:, None] if kind == "sdpa" else additive
        hidden = layer(
            hidden, attention_mask=layer_mask, position_ids=here,
            position_embeddings=text.rotary_emb(hidden, position_ids=here),
        )  # fmt: skip
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return model.lm_head(text.norm(hidden))
