# SPDX-License-Identifier: Apache-2.0
"""QueCC against the authors' own module: outputs, gradients, hidden states and question vector, parameter counts."""

from __future__ import annotations

import json
import math

import pytest
import torch
import vectors
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vlmcompress import quecc
from vlmcompress.projectors.quecc import QueCC, QueCCProjector, regions_of

CLOSE = dict(atol=1e-5, rtol=1e-5)
CASES = vectors.cases("quecc")
given = pytest.mark.skipif(not vectors.folder("quecc").exists(), reason="reference vectors are not beside the project")


def named(*stems: str) -> list:
    return [p for p in CASES if not hasattr(p, "stem") or p.stem in stems]


def read(path):
    return json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))


def weights(tensors) -> dict:
    return {k.removeprefix("w."): v for k, v in tensors.items() if k.startswith("w.")}


def module(case, tensors) -> QueCC:
    side = math.isqrt(case["visual_tokens"])
    made = QueCC(
        case["embed_dim"], case["text_dim"], d_multi=case["multi_dim"], grid=(side, side), kernel=case["kernel"],
        stride=case["stride"], heads=case["heads"],
    )  # fmt: skip
    made.load_state_dict(weights(tensors))
    return made


@pytest.mark.parametrize("path", named(*(f"case_{n:02}" for n in (*range(1, 9), 10))))
@torch.no_grad()
def test_outputs(path):
    case, tensors = read(path)
    out = module(case, tensors)(tensors["in.x_multi"], tensors["in.text"], tensors["in.x"])
    assert out.shape[1] == case["out_tokens"]
    torch.testing.assert_close(out, tensors["out.y"], **CLOSE)


@pytest.mark.parametrize("path", named("case_08"))
@torch.no_grad()
def test_the_projector_reads_the_joined_states(path):
    case, tensors = read(path)
    d, text = case["embed_dim"], case["text_dim"]
    projector = QueCCProjector(d, text, layers=4, grid=(24, 24), kernel=case["kernel"])
    projector.compressor.load_state_dict(weights(tensors))
    projector.ask(tensors["in.text"][:, 0])
    torch.testing.assert_close(projector(tensors["in.x_multi"]), projector.mlp(tensors["out.y"]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("path", named("case_09"))
@torch.no_grad()
def test_released_projector(path):
    case, tensors = read(path)
    side, d = math.isqrt(case["visual_tokens"]), case["embed_dim"]
    whole = weights(tensors)
    projector = QueCCProjector(
        d, case["text_dim"], layers=case["multi_dim"] // d, grid=(side, side), kernel=case["kernel"]
    )
    for names in (whole, {f"model.mm_projector.{k}": v for k, v in whole.items()}):
        projector.load_state_dict(dict(names))
        found = projector.mlp(projector.compressor(tensors["in.x_multi"], tensors["in.text"], tensors["in.x"]))
        torch.testing.assert_close(found, tensors["out.y"], **CLOSE)


def test_official_names_load():
    ours = QueCCProjector(16, 24, layers=4, grid=(6, 6), kernel=3)
    official = {}
    for key, value in ours.state_dict().items():
        first, _, rest = key.partition(".")
        number, _, leaf = rest.partition(".")
        name = f"0.{rest}" if first == "compressor" else f"{int(number) + 1}.{leaf}"
        official[f"model.mm_projector.{name}"] = value + 1
    fresh = QueCCProjector(16, 24, layers=4, grid=(6, 6), kernel=3)
    fresh.load_state_dict(official)
    assert all(fresh.state_dict()[k].equal(v + 1) for k, v in ours.state_dict().items())


@pytest.mark.parametrize("path", named("case_10"))
def test_gradients(path):
    case, tensors = read(path)
    made = module(case, tensors)
    inputs = [tensors[f"in.{name}"].requires_grad_() for name in ("x_multi", "text", "x")]
    (made(*inputs) * tensors["in.cotangent"]).sum().backward()
    for name, x in zip(("x_multi", "text", "x"), inputs, strict=True):
        torch.testing.assert_close(x.grad, tensors[f"grad.{name}"], atol=1e-4, rtol=1e-4)
    for name, parameter in made.named_parameters():
        torch.testing.assert_close(parameter.grad, tensors[f"grad.w.{name}"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("path", named("case_11"))
@torch.no_grad()
def test_hidden_states_and_question_vector_on_the_stock_class(path):
    case, tensors = read(path)
    vision = {k: v for k, v in case["vision_config"].items() if k in CLIPVisionConfig().to_dict()}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(**case["llm_config"]), image_token_id=49,
        vision_feature_layer=-2,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("vis.")})
    llm = {k[4:]: v for k, v in tensors.items() if k.startswith("llm.")}
    model.model.language_model.load_state_dict(
        {k.removeprefix("model."): v for k, v in llm.items() if not k.startswith("lm_head")}
    )
    projector = quecc.install(model, tokens=4)
    assert model.config.vision_feature_layer == [12, 16, 22, 23]
    seen = []
    projector.register_forward_pre_hook(lambda m, args: seen.append((args[0], m.question)))
    ids = torch.full((2, 6), 49)
    ids[:, 4:] = 7
    queries = {"query_input_ids": tensors["in.query_ids"], "query_attention_mask": tensors["in.query_mask"]}
    model(input_ids=ids, pixel_values=tensors["in.pixel_values"], **queries)
    (x_multi, question) = seen[0]
    torch.testing.assert_close(x_multi, tensors["out.x_multi"], **CLOSE)
    torch.testing.assert_close(x_multi[..., -16:], tensors["out.x"], **CLOSE)
    torch.testing.assert_close(question, tensors["out.text"][:, 0], **CLOSE)
    left = {k: v.clone() for k, v in queries.items()}
    for row, mask in enumerate(queries["query_attention_mask"].bool()):  # padding on the other side changes nothing
        left["query_input_ids"][row] = torch.cat(
            [queries["query_input_ids"][row][~mask], left["query_input_ids"][row][mask]]
        )
        left["query_attention_mask"][row] = torch.cat([mask[~mask], mask[mask]])
    ours = quecc.question_vectors(model, **left)
    torch.testing.assert_close(ours, tensors["out.text"][:, 0], atol=1e-5, rtol=1e-4)


@given
def test_parameter_counts():
    counts = json.loads((vectors.folder("quecc") / "parameters.json").read_text())

    def size(part):
        return sum(p.numel() for p in part.parameters())

    with torch.device("meta"):
        projector = QueCCProjector(1024, 4096, layers=4, grid=(24, 24), kernel=4)
        convolutions = {
            k: size(QueCC(1024, 8, d_multi=8, grid=(24, 24), kernel=int(k)).q_downsample)
            for k in counts["conv_by_kernel"]
        }
    assert {name: size(getattr(projector.compressor, name)) for name in counts["per_part"]} == counts["per_part"]
    assert size(projector.compressor) == counts["total"] and size(projector.mlp) == counts["mlp2x_gelu"]
    assert convolutions == counts["conv_by_kernel"]


@given
def test_geometry():
    pairs = json.loads((vectors.folder("quecc") / "geometry.json").read_text())
    for kernel, stride, side in pairs["equal"]:
        if 24 % kernel:
            with pytest.raises(ValueError, match="do not fill a grid of 24 × 24"):
                regions_of((24, 24), kernel, stride)
        else:
            assert regions_of((24, 24), kernel, stride) == (side, side)
    unequal = 0
    for kernel in range(1, 25):
        for stride in range(1, 25):
            try:
                unequal += kernel != stride and bool(regions_of((24, 24), kernel, stride))
            except ValueError:
                continue
    assert unequal == pairs["n_unequal"]
