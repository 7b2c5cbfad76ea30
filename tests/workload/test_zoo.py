"""The known models: their exact counts, and their arithmetic against transformers' own implementations."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from headway.errors import InputError
from headway.workload import zoo
from headway.workload.zoo.language import MixtureOfExperts

SMALL = {
    "GPT": {"layers": 2, "width": 32, "heads": 4, "vocabulary": 61, "context": 16},
    "Llama": {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "hidden": 48, "vocabulary": 61},
    "Bert": {"layers": 2, "width": 32, "heads": 4, "vocabulary": 61, "context": 16},
}


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(name: str, **overrides) -> torch.nn.Module:
    with torch.device("meta"):
        return zoo.build(name, **overrides)


@pytest.mark.parametrize("name", zoo.names())
def test_every_model_has_exactly_the_parameters_of_its_publisher(name):
    assert count(on_meta(name)) == zoo.entry(name).parameters


def test_the_counts_that_papers_and_model_cards_print():
    printed = {
        "gpt2": 124_439_808, "llama3.1-8b": 8_030_261_248, "llama3.1-70b": 70_553_706_496,
        "mixtral-8x7b": 46_702_792_704, "bert-base": 109_482_240, "resnet50": 25_557_032, "resnet152": 60_192_808,
        "vgg16": 138_357_544, "alexnet": 61_100_840, "inception-v3": 23_834_568,
    }  # fmt: skip
    assert {name: zoo.entry(name).parameters for name in printed} == printed
    assert count(on_meta("inception-v3", auxiliary=True)) == 27_161_264


def test_gpt3_follows_the_closed_form_of_its_table():
    layers, width, vocabulary, context = 96, 12288, 50257, 2048
    expected = layers * (12 * width**2 + 13 * width) + (vocabulary + context) * width + 2 * width
    assert zoo.entry("gpt3-175b").parameters == expected


def test_counts_equal_those_of_transformers():
    transformers = pytest.importorskip("transformers")

    def llama(layers, width, heads, hidden):
        config = transformers.LlamaConfig(
            vocab_size=128256, hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=8,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)

    theirs = {
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config()),
        "bert-base": lambda: transformers.BertModel(transformers.BertConfig()),
        "llama3.1-8b": lambda: llama(32, 4096, 32, 14336),
        "llama3.1-70b": lambda: llama(80, 8192, 64, 28672),
        "llama3.1-405b": lambda: llama(126, 16384, 128, 53248),
        "mixtral-8x7b": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(vocab_size=32000)),
    }
    with torch.device("meta"):
        assert {name: count(build()) for name, build in theirs.items()} == {
            name: zoo.entry(name).parameters for name in theirs
        }


@pytest.mark.parametrize("name", zoo.names())
def test_the_loss_of_sample_inputs_is_a_scalar(name):
    kind = zoo.entry(name).kind
    overrides = SMALL.get(kind, {})
    sequence = None if zoo.entry(name).task == "image" else 16
    inputs, targets = zoo.sample_inputs(name, 3, sequence, **overrides)
    assert inputs.device.type == targets.device.type == "meta"
    assert inputs.shape[0] == targets.shape[0] == 3
    assert zoo.loss(name)(on_meta(name, **overrides)(inputs), targets).shape == ()


def test_inception_with_its_auxiliary_classifier_trains_on_both():
    inputs, targets = zoo.sample_inputs("inception-v3", 2)
    output = on_meta("inception-v3", auxiliary=True)(inputs)
    assert [tuple(logits.shape) for logits in output] == [(2, 1000), (2, 1000)]
    assert zoo.loss("inception-v3")(output, targets).shape == ()


def test_sample_inputs_have_the_default_shapes():
    assert zoo.sample_inputs("llama3.1-8b", 2)[0].shape == (2, 8192)
    assert zoo.sample_inputs("resnet50", 2)[0].shape == (2, 3, 224, 224)
    assert zoo.sample_inputs("inception-v3", 2)[0].shape == (2, 3, 299, 299)
    tokens, embedding = zoo.sample_inputs("bert-base", 2)
    assert (tokens.shape, embedding.shape) == ((2, 512), (2, 768))


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda: zoo.build("gtp2"), "gpt2"),
        (lambda: zoo.build("gpt2", layer=2), "layers"),
        (lambda: zoo.sample_inputs("gpt2", 1, 2000), "shorten"),
        (lambda: zoo.sample_inputs("resnet50", 1, 16), "leave the sequence out"),
        (lambda: zoo.trace("resnet50", layers=2), "blocks"),
        (lambda: zoo.loss("something else entirely"), "one of:"),
    ],
)
def test_mistakes_are_refused_with_a_remedy(call, hint):
    with pytest.raises(InputError) as caught:
        call()
    assert hint in caught.value.remedy


def copy(target: torch.nn.Module, source: torch.nn.Module, *, transpose: bool = False) -> None:
    """Weights, and biases where there are any; transposed for GPT-2's Conv1D."""
    with torch.no_grad():
        target.weight.copy_(source.weight.t() if transpose else source.weight)
        if getattr(target, "bias", None) is not None:
            target.bias.copy_(source.bias)


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    # Larger than the usual initialization, so that a wrong rotation or mask would show.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def copy_llama_attention(block, theirs):
    copy(block.attention_norm, theirs.input_layernorm)
    copy(block.feed_forward_norm, theirs.post_attention_layernorm)
    copy(block.attention.query, theirs.self_attn.q_proj)
    copy(block.attention.key, theirs.self_attn.k_proj)
    copy(block.attention.value, theirs.self_attn.v_proj)
    copy(block.attention.output, theirs.self_attn.o_proj)


def copy_llama_ends(ours, theirs):
    copy(ours.token_embedding, theirs.model.embed_tokens)
    copy(ours.norm, theirs.model.norm)
    copy(ours.head, theirs.lm_head)


TOKENS = torch.arange(2 * 16).view(2, 16) * 7 % 61


def test_gpt_computes_what_transformers_gpt2_computes():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=61, n_positions=16)
    theirs = randomize(transformers.GPT2LMHeadModel(config))
    ours = zoo.build("gpt2", **SMALL["GPT"]).eval()
    copy(ours.token_embedding, theirs.transformer.wte)
    copy(ours.position_embedding, theirs.transformer.wpe)
    copy(ours.norm, theirs.transformer.ln_f)
    for block, other in zip(ours.blocks, theirs.transformer.h, strict=True):
        copy(block.attention_norm, other.ln_1)
        copy(block.feed_forward_norm, other.ln_2)
        with torch.no_grad():
            for position, part in enumerate((block.attention.query, block.attention.key, block.attention.value)):
                columns = slice(32 * position, 32 * (position + 1))
                part.weight.copy_(other.attn.c_attn.weight[:, columns].t())
                part.bias.copy_(other.attn.c_attn.bias[columns])
        copy(block.attention.output, other.attn.c_proj, transpose=True)
        copy(block.feed_forward.expand, other.mlp.c_fc, transpose=True)
        copy(block.feed_forward.contract, other.mlp.c_proj, transpose=True)
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits)


@pytest.mark.parametrize("scaling", [1.0, 8.0])
def test_llama_computes_what_transformers_llama_computes(scaling):
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    if scaling != 1.0:
        rope = {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": scaling, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        }  # fmt: skip
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, rope_parameters=rope, max_position_embeddings=131072,
    )  # fmt: skip
    theirs = randomize(transformers.LlamaForCausalLM(config))
    ours = zoo.build("llama3.1-8b", **SMALL["Llama"], rotary_scaling=scaling).eval()
    copy_llama_ends(ours, theirs)
    for block, other in zip(ours.blocks, theirs.model.layers, strict=True):
        copy_llama_attention(block, other)
        copy(block.feed_forward.gate, other.mlp.gate_proj)
        copy(block.feed_forward.up, other.mlp.up_proj)
        copy(block.feed_forward.down, other.mlp.down_proj)
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_mixtral_without_dropped_tokens_computes_what_transformers_mixtral_computes():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    theirs = randomize(transformers.MixtralForCausalLM(config))
    # 4 experts, 2 for each token: with room for all tokens in every expert, none is dropped.
    ours = zoo.build("mixtral-8x7b", **SMALL["Llama"], experts=4, capacity_factor=2.0).eval()
    copy_llama_ends(ours, theirs)
    for block, other in zip(ours.blocks, theirs.model.layers, strict=True):
        copy_llama_attention(block, other)
        copy(block.feed_forward.router, other.mlp.gate)
        with torch.no_grad():
            for position, expert in enumerate(block.feed_forward.experts):
                gate, up = other.mlp.experts.gate_up_proj[position].chunk(2)
                expert.gate.weight.copy_(gate)
                expert.up.weight.copy_(up)
                expert.down.weight.copy_(other.mlp.experts.down_proj[position])
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_bert_computes_what_transformers_bert_computes():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=16,
    )  # fmt: skip
    theirs = randomize(transformers.BertModel(config))
    ours = zoo.build("bert-base", **SMALL["Bert"]).eval()
    copy(ours.token_embedding, theirs.embeddings.word_embeddings)
    copy(ours.position_embedding, theirs.embeddings.position_embeddings)
    copy(ours.segment_embedding, theirs.embeddings.token_type_embeddings)
    copy(ours.embedding_norm, theirs.embeddings.LayerNorm)
    copy(ours.pooler, theirs.pooler.dense)
    for block, other in zip(ours.blocks, theirs.encoder.layer, strict=True):
        copy(block.attention.query, other.attention.self.query)
        copy(block.attention.key, other.attention.self.key)
        copy(block.attention.value, other.attention.self.value)
        copy(block.attention.output, other.attention.output.dense)
        copy(block.attention_norm, other.attention.output.LayerNorm)
        copy(block.feed_forward.expand, other.intermediate.dense)
        copy(block.feed_forward.contract, other.output.dense)
        copy(block.feed_forward_norm, other.output.LayerNorm)
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).pooler_output, rtol=1e-4, atol=1e-5)


def test_experts_cost_the_flop_of_two_of_eight_and_shapes_follow_from_shapes_alone():
    samples, sequence, width, hidden = 2, 16, 32, 48
    sizes = {**SMALL["Llama"], "experts": 8}
    inputs, _ = zoo.sample_inputs("mixtral-8x7b", samples, sequence, **sizes)
    with FlopCounterMode(display=False) as counter:
        on_meta("mixtral-8x7b", **sizes)(inputs)  # on meta there is no data that a shape could depend on
    inside = {name: flop for name, flop in counter.get_flop_counts().items() if re.search(r"\.experts\.\d+$", name)}
    assert len(inside) == sizes["layers"] * 8
    expected = sizes["layers"] * samples * sequence * 2 * 3 * 2 * width * hidden
    assert sum(sum(flop.values()) for flop in inside.values()) == expected


@given(st.integers(1, 4), st.sampled_from([0.25, 0.5, 1.0, 1.5, 4.0]), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_experts_keep_the_tokens_that_weigh_them_highest(top_k, capacity_factor, seed):
    torch.manual_seed(seed)
    layer = MixtureOfExperts(8, 12, 4, top_k, capacity_factor)
    x_BTD = torch.randn(2, 5, 8)
    with torch.no_grad():
        layer.router.weight.mul_(4)
        x_ND = x_BTD.flatten(0, 1)
        weight_Nk, expert_Nk = layer.router(x_ND).softmax(-1).topk(top_k)
        weight_Nk /= weight_Nk.sum(-1, keepdim=True)
        capacity = min(10, math.ceil(capacity_factor * top_k * 10 / 4))
        expected = torch.zeros_like(x_ND)
        for expert in range(4):
            takers = [(float(weight_Nk[n, k]), n) for n in range(10) for k in range(top_k) if expert_Nk[n, k] == expert]
            for weight, n in sorted(takers, reverse=True)[:capacity]:
                expected[n] += weight * layer.experts[expert](x_ND[n])
        ties = top_k == 1  # every weight is 1 then, and any choice among them is right
        actual = layer(x_BTD).flatten(0, 1)
    if ties:
        assert int((actual.abs().sum(-1) > 0).sum()) == int((expected.abs().sum(-1) > 0).sum())
    else:
        torch.testing.assert_close(actual, expected)
