# SPDX-License-Identifier: Apache-2.0
"""The small convolutional predictor of visual relevance and how relevance itself is measured (arXiv 2506.01097)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from .dtypes import LongTensor
from .ops.relevance import step_back

WIDTHS = (32, 64, 128, 256, 512)
#: folder beside a model's weights that holds its predictors, one file for each kind of picture
FOLDER = "relevance"


class RelevancePredictor(nn.Module):
    """Depthwise-separable 1-D convolutions over the row of visual tokens, one logit per token.

    [B, N] first-layer map → [B, N] logits; a softmax over them predicts the label of
    :func:`vlmcompress.ops.relevance.relevance_labels`. Kernel, zero padding, ReLU behind every pointwise convolution and
    no normalisation are ours, the paper names the widths only; it works for any length.

    Args:
        widths: output channels of the blocks.
        kernel: odd length of the depthwise kernels.
        scale_by_length: multiply the map by the number of visual tokens first, so that its entries are near one whatever
            the length. Saved with the weights, since training and use must agree.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS, kernel: int = 3, *, scale_by_length: bool = False):
        super().__init__()
        if not widths or kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"A predictor has at least one block and an odd kernel, not {list(widths)} and {kernel}.")
        self.options = {"widths": list(widths), "kernel": kernel, "scale_by_length": scale_by_length}
        inputs = [1, *widths[:-1]]
        self.dw = nn.ModuleList(nn.Conv1d(c, c, kernel, padding=kernel // 2, groups=c) for c in inputs)
        self.pw = nn.ModuleList(nn.Conv1d(c, width, 1) for c, width in zip(inputs, widths, strict=True))
        self.head = nn.Conv1d(widths[-1], 1, 1)

    def forward(self, maps: Tensor, valid: Tensor | None = None) -> Tensor:
        """Logits [B, N] fp32 for ``maps`` [B, N]; minus infinity where ``valid`` [B, N] says padding."""
        mask = torch.ones_like(maps, dtype=torch.bool) if valid is None else valid.bool()
        x = maps.to(self.head.weight.dtype)
        if self.options["scale_by_length"]:
            x = x * mask.sum(1, keepdim=True)
        x = x[:, None]
        for depthwise, pointwise in zip(self.dw, self.pw, strict=True):
            # biases would leak from the padded zone into real tokens
            x = pointwise(depthwise(x * mask[:, None])).relu()
        return self.head(x)[:, 0].float().masked_fill(~mask, -torch.inf)

    @property
    def flops(self) -> int:
        """Floating-point operations per visual token."""
        convolutions = [*self.dw, *self.pw, self.head]
        return sum(2 * module.weight.numel() for module in convolutions if isinstance(module, nn.Conv1d))

    def save(self, path: str | Path) -> None:
        """Write weights and options to one safetensors file."""
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, path, metadata={"predictor": json.dumps(self.options)})

    @classmethod
    def load(cls, path: str | Path) -> RelevancePredictor:
        """Read what :meth:`save` wrote, in evaluation mode. Raises ``ValueError`` for another file."""
        if not Path(path).is_file():
            raise ValueError(f"There is no predictor at {path}.")
        with safe_open(path, "pt") as file:
            options = (file.metadata() or {}).get("predictor")
            if options is None:
                raise ValueError(f"{path} holds no relevance predictor.")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        predictor = cls(**json.loads(options))
        predictor.load_state_dict(state)
        return predictor.eval()


def predictor_of(model: PreTrainedModel, kind: str) -> RelevancePredictor | None:
    """The predictor for "image" or "video" that lies beside the weights of ``model``, on its device; None for none."""
    name = model.config._name_or_path
    if not name:
        return None
    try:
        path = cached_file(name, f"{kind}.safetensors", subfolder=FOLDER)
    except OSError:  # neither in the folder nor on the hub
        return None
    return None if path is None else RelevancePredictor.load(path).to(model.device)


class RollOut:
    """Relevance of every input position to single output logits, streamed through the backward pass.

    Put around one forward pass of a causal model that runs eager attention with gradients::

        with RollOut(attention_modules) as roll_out:
            logits = model(inputs_embeds=embeds, use_cache=False).logits
        relevance = roll_out.of(logits[:, row, token].sum(), row)

    The modules are those of the decoder's layers, first to last, whose second output are the attention probabilities
    [B, H, n, n]. Every backward pass visits the layers from the last to the first, and a hook on each map carries one row
    down, so that gradients of one map are alive at a time. The model's weights need no gradient; the embeddings do.
    """

    def __init__(self, attention_modules: Sequence[nn.Module]):
        self._modules, self._handles = list(attention_modules), []
        self._row: Tensor | None = None
        self._left = len(self._modules)

    def __enter__(self) -> RollOut:
        for number, module in enumerate(self._modules):
            self._handles.append(module.register_forward_hook(self._watch(number)))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _watch(self, number: int) -> Callable:
        def hook(module: nn.Module, args: tuple, output: tuple) -> None:
            attention = output[1]
            if attention is None or not attention.requires_grad:
                raise ValueError(
                    "Relevance needs attention probabilities with gradients: load the model with "
                    "attn_implementation='eager' and let inputs_embeds require a gradient."
                )
            # a closure over the map would keep it from being freed together with the graph
            kept = attention.detach()
            attention.register_hook(lambda gradient: self._carry(number, kept, gradient))

        return hook

    def _carry(self, number: int, attention: Tensor, gradient: Tensor) -> None:
        if self._row is None or number != self._left - 1:
            raise ValueError("The layers were not visited from the last to the first; call RollOut.of for each logit.")
        self._row = step_back(self._row, attention, gradient)
        self._left = number

    def of(self, target: Tensor, row: int, *, embeds: Tensor, last: bool = False) -> Tensor:
        """[B, n] relevance of all positions of ``embeds`` [B, n, D] to ``target``, a scalar read off position ``row``.

        ``last``: no further call follows, the graph may go.
        """
        self._row = torch.zeros(embeds.shape[:2], device=embeds.device)
        self._row[:, row] = 1
        self._left = len(self._modules)
        torch.autograd.grad(target, embeds, retain_graph=not last)
        found, self._row = self._row, None
        return found


def answer_relevance(
    attention_modules: Sequence[nn.Module],
    logits_of: Callable[[Tensor], Tensor],
    embeds: Tensor,
    prompt: int,
    answer: Sequence[int] | LongTensor,
    *,
    logprob: bool = False,
    steps: Sequence[int] | None = None,
) -> Tensor:
    """[steps, n] relevance of all positions to each token of ``answer``, one teacher-forced pass for all of them.

    Args:
        attention_modules: see :class:`RollOut`.
        logits_of: the causal model, [B, n, D] embeddings → [B, n, vocabulary] logits.
        embeds: [B, prompt + steps - 1, D] embeddings of the prompt and of all answer tokens but the last.
        prompt: length of the prompts; row ``prompt + t - 1`` predicts answer token t.
        answer: the model's own greedy answer; [B, steps] for prompts and answers of one length, without padding.
        logprob: explain log-probabilities instead of logits (gives other maps).
        steps: the answer tokens that are explained; None: all.

    Returns:
        [steps, n], or [B, steps, n] where ``answer`` is [B, steps]. Samples do not mix: a logit of one has no gradient in
        another.

    Raises ``ValueError`` when the model does not run eager attention or the lengths do not fit.
    """
    wanted = torch.as_tensor(answer, device=embeds.device)
    tokens = wanted if wanted.ndim == 2 else wanted[None]
    length = tokens.shape[1]
    if not length or embeds.shape[:2] != (len(tokens), prompt + length - 1):
        raise ValueError(f"{embeds.shape[1]} embeddings are no prompt of {prompt} and an answer of {length} tokens.")
    explained = range(length) if steps is None else steps
    embeds = embeds.detach().requires_grad_(True)
    with torch.enable_grad(), RollOut(attention_modules) as roll_out:
        logits = logits_of(embeds).float()
        found = []
        for number, step in enumerate(explained, 1):
            row = prompt + step - 1
            scores = logits[:, row].log_softmax(-1) if logprob else logits[:, row]
            target = scores.gather(1, tokens[:, step : step + 1]).sum()
            found.append(roll_out.of(target, row, embeds=embeds, last=number == len(explained)))
    relevance = torch.stack(found, 1)
    return relevance if wanted.ndim == 2 else relevance[0]
