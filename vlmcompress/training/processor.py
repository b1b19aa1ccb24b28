# SPDX-License-Identifier: Apache-2.0
"""The tokenizer and the processor of the small models: lower-case words, no punctuation, any text."""

from easy_vqa import get_answers, get_train_questions
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from .questions import vocabulary

SPECIALS = ("<pad>", "<s>", "<unk>", "</s>", "<image>")
VOCAB_SIZE = 128  # the words fill about 90 places; the rest is room for more

# An image is "<image>", a text is itself, an assistant's turn ends in </s>. The question mark is dropped by the
# tokenizer and the template adds no word, so that the answer comes straight after the key word that ends a question.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %} {{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% elif part['type'] == 'text' %} {{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
)


def words() -> list[str]:
    """The whole vocabulary in id order: special tokens, words of the scenes, words of easy-VQA's training split."""
    asked = {word for question in get_train_questions()[0] for word in question.lower().replace("?", "").split()}
    found = list(dict.fromkeys([*SPECIALS, *vocabulary(), *sorted(asked | set(get_answers()))]))
    return found + [f"<unused{i}>" for i in range(VOCAB_SIZE - len(found))]


def build_tokenizer(found: list[str] | None = None, visual: dict[str, str] | None = None) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that puts <s> in front of every text.

    ``found`` is the vocabulary in id order (default: `words`), ``visual`` the names and texts of the special tokens that
    stand for what is seen (default: LLaVA's).
    """
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(found or words())}, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"[?!.,:;\"']"), " ")])
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", SPECIALS.index("<s>"))])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=visual or {"image_token": "<image>"},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    return tokenizer


def build_processor(image_size: int = 96, patch_size: int = 8) -> LlavaProcessor:
    """The LLaVA processor: shorter side to ``image_size``, centre crop, pixels in [-1, 1]."""
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def tiled_processor(base: LlavaProcessor, pinpoints: list[list[int]]) -> LlavaNextProcessor:
    """The LLaVA-NeXT processor with the tokenizer, the template and the pixel range of ``base``.

    Tiles and thumbnail have the size of its pictures; ``pinpoints`` are the canvases (height, width) of tiles.
    """
    pixels = base.image_processor
    image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": pixels.size["shortest_edge"]},
        crop_size=dict(pixels.crop_size),
        image_mean=pixels.image_mean,
        image_std=pixels.image_std,
        image_grid_pinpoints=pinpoints,
    )
    return LlavaNextProcessor(
        image_processor=image_processor,
        tokenizer=base.tokenizer,
        patch_size=base.patch_size,
        vision_feature_select_strategy=base.vision_feature_select_strategy,
        num_additional_image_tokens=base.num_additional_image_tokens,
        chat_template=base.chat_template,
    )
