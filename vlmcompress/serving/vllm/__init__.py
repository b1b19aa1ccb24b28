# SPDX-License-Identifier: Apache-2.0
"""The plug-in for vLLM: stock servers, images with fewer visual tokens.

vLLM finds :func:`register` through its entry-point group ``vllm.general_plugins`` and calls it in each of its processes.
Our classes take the places of vLLM's own for the families that can be served, and are those classes to the letter where
a model's configuration has no ``vlmcompress`` entry.
"""

from __future__ import annotations

_PACKAGE = __name__

#: architecture → module of this package and class in it
SERVED = {
    "LlavaForConditionalGeneration": "llava:CompressedLlava",
    "LlavaNextForConditionalGeneration": "llava_next:CompressedLlavaNext",
    "LlavaOnevisionForConditionalGeneration": "llava_onevision:CompressedLlavaOnevision",
    "InternVLForConditionalGeneration": "internvl:CompressedInternVL",
    "Qwen2_5_VLForConditionalGeneration": "qwen:CompressedQwen25VL",
    "Qwen3VLForConditionalGeneration": "qwen3:CompressedQwen3VL",
}

#: architectures of further families of ours → vLLM's module: they refuse the setting
REFUSED = {
    "Gemma3ForConditionalGeneration": "gemma3_mm",
    "Idefics3ForConditionalGeneration": "idefics3",
    "LlavaNextVideoForConditionalGeneration": "llava_next_video",
    "PaliGemmaForConditionalGeneration": "paligemma",
    "Qwen2VLForConditionalGeneration": "qwen2_vl",
    "SmolVLMForConditionalGeneration": "smolvlm",
}


def register() -> None:
    """Make the served families known to this process. Safe to call again; imports no model."""
    from vllm import ModelRegistry

    for architecture, place in SERVED.items():
        ModelRegistry.register_model(architecture, f"{_PACKAGE}.{place}")
    for architecture in REFUSED:
        ModelRegistry.register_model(architecture, f"{_PACKAGE}.refused:{architecture}")
