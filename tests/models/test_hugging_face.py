"""`config.json` of published models, as their authors wrote them: the sizes by hand, and the number of parameters that each is known to have."""

import dataclasses
import json
import math

import jax
import pytest

from pgrpo_jax.models import hugging_face
from pgrpo_jax.models.config import RopeScaling
from pgrpo_jax.models.parameters import parameter_shapes

LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001,
    "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072,
    "mlp_bias": False, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 128256,
    "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"
    },
}  # fmt: skip
QWEN_2_5_HALF_B = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu",
    "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2",
    "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWQ_32B = {
    **QWEN_2_5_HALF_B, "hidden_size": 5120, "intermediate_size": 27648, "max_position_embeddings": 40960, "max_window_layers": 64,
    "num_attention_heads": 40, "num_hidden_layers": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "tie_word_embeddings": False,
    "vocab_size": 152064,
}  # fmt: skip
QWEN_3_1_7B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16,
    "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN_3_8B = {
    **QWEN_3_1_7B, "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_hidden_layers": 36, "tie_word_embeddings": False,
}  # fmt: skip
QWEN_3_30B_A3B = {
    **QWEN_3_1_7B, "architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 1, "max_window_layers": 48, "mlp_only_layers": [],
    "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False, "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
}  # fmt: skip
GEMMA_2B = {
    "architectures": ["GemmaForCausalLM"], "attention_bias": False, "head_dim": 256, "hidden_act": "gelu", "hidden_activation": None,
    "hidden_size": 2048, "intermediate_size": 16384, "max_position_embeddings": 8192, "model_type": "gemma", "num_attention_heads": 8,
    "num_hidden_layers": 18, "num_key_value_heads": 1, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000.0, "vocab_size": 256000,
}  # fmt: skip
GEMMA_2_2B = {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304,
    "intermediate_size": 9216, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8, "num_hidden_layers": 26,
    "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 256000,
}  # fmt: skip
GEMMA_3_1B = {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912, "max_position_embeddings": 32768,
    "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
    "sliding_window_pattern": 6, "vocab_size": 262144,
}  # fmt: skip
PARAMETERS = {
    "LLAMA_3_2_1B": 1_235_814_400, "QWEN_2_5_HALF_B": 494_032_768, "QWQ_32B": 32_763_876_352, "QWEN_3_1_7B": 1_720_574_976, "QWEN_3_8B": 8_190_735_360,
    "QWEN_3_30B_A3B": 30_532_122_624, "GEMMA_2B": 2_506_172_416, "GEMMA_2_2B": 2_614_341_888, "GEMMA_3_1B": 999_885_952,
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_models_have_their_parameters(name):
    config = hugging_face.to_model_config(globals()[name])
    assert sum(math.prod(spec.shape) for spec in jax.tree.leaves(parameter_shapes(config))) == PARAMETERS[name]


def test_what_sets_the_families_apart():
    read = {name: hugging_face.to_model_config(globals()[name]) for name in PARAMETERS}
    assert read["LLAMA_3_2_1B"].rope_scaling == RopeScaling(kind="llama3", factor=32.0, low_factor=1.0, high_factor=4.0, original_context=8192)
    assert read["LLAMA_3_2_1B"].rope_theta == 5e5 and read["LLAMA_3_2_1B"].norm_epsilon == 1e-5
    assert {name for name, config in read.items() if config.qkv_bias} == {"QWEN_2_5_HALF_B", "QWQ_32B"}
    assert {name for name, config in read.items() if config.qk_norm} == {"QWEN_3_1_7B", "QWEN_3_8B", "QWEN_3_30B_A3B", "GEMMA_3_1B"}
    assert {name for name, config in read.items() if config.num_experts} == {"QWEN_3_30B_A3B"}
    moe = read["QWEN_3_30B_A3B"]
    assert (moe.mlp_width, moe.num_experts, moe.experts_per_token, moe.normalised_experts) == (768, 128, 8, True)
    assert {name for name, config in read.items() if config.post_norms} == {"GEMMA_2_2B", "GEMMA_3_1B"}
    gemmas = {"GEMMA_2B", "GEMMA_2_2B", "GEMMA_3_1B"}
    for name, config in read.items():
        assert (config.activation, config.norm_offset) == (("gelu_tanh", 1.0) if name in gemmas else ("silu", 0.0))
        assert config.embedding_scale == (math.sqrt(config.width) if name in gemmas else 1.0)
    assert (read["GEMMA_2_2B"].score_soft_cap, read["GEMMA_2_2B"].logit_soft_cap) == (50.0, 30.0)
    assert read["GEMMA_2_2B"].windows == (4096, 0) * 13
    assert read["GEMMA_3_1B"].windows == (512, 512, 512, 512, 512, 0) * 4 + (512, 512)
    assert (read["GEMMA_3_1B"].rope_theta, read["GEMMA_3_1B"].local_rope_theta, read["GEMMA_3_1B"].query_scalar) == (1e6, 1e4, 256.0)
    assert all(config.windows == () for name, config in read.items() if name not in {"GEMMA_2_2B", "GEMMA_3_1B"})


def test_layers_may_be_named_one_by_one():
    kinds = ["full_attention", "sliding_attention"] * 13
    assert hugging_face.to_model_config({**GEMMA_3_1B, "layer_types": kinds}).windows == (0, 512) * 13
    windows = hugging_face.to_model_config({**QWEN_2_5_HALF_B, "use_sliding_window": True, "sliding_window": 8}).windows
    assert windows == (0,) * 21 + (8,) * 3


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(architectures=["GPT2LMHeadModel"]), r"architectures is \['GPT2LMHeadModel'\], known are LlamaForCausalLM, Qwen2ForCausalLM, .*Gemma3"),
        (dict(architectures="LlamaForCausalLM"), "architectures is 'LlamaForCausalLM', known are"),
        (dict(architectures=None), "architectures is None"),
        (dict(hidden_size=None), "hidden_size is missing"),
        (dict(hidden_size="2048"), "hidden_size is '2048', must be of type int"),
        (dict(num_hidden_layers=0), r"num_layers is 0, must be a whole number in \[1, "),
        (dict(num_attention_heads=0), "num_heads is 0, must be"),
        (dict(num_key_value_heads=5), "must be a multiple of num_kv_heads 5"),
        (dict(attention_bias=True), "attention_bias is True, must be False or absent: the transformer does not compute it"),
        (dict(mlp_bias=True), "mlp_bias is True"),
        (dict(hidden_act="relu"), "hidden_act is 'relu', must be 'silu'"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rope scaling 'yarn' is not computed: known are linear, llama3"),
        (dict(rope_scaling={"rope_type": "llama3", "factor": 4.0}), "low_freq_factor is missing"),
        (dict(rope_scaling={"rope_type": "linear", "factor": 0.5}), r"factor is 0.5, must be in \[1, inf\)"),
        (dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}), "partial_rotary_factor is 0.5, must be 1.0"),
        (dict(tie_word_embeddings=1), "tie_word_embeddings is 1, must be of type bool"),
        (dict(rms_norm_eps="small"), "rms_norm_eps is 'small', must be of type float"),
    ],
)
def test_what_is_not_computed_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        hugging_face.to_model_config({**LLAMA_3_2_1B, **changes})


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(decoder_sparse_step=2), "decoder_sparse_step is 2, must be 1 or absent: the transformer does not compute it"),
        (dict(mlp_only_layers=[0]), r"mlp_only_layers is \[0\], must be \[\] or absent"),
        (dict(num_experts=None), "num_experts is missing"),
        (dict(num_experts=0), r"experts_per_token is 8, must be in \[0, num_experts = 0\]"),
        (dict(num_experts_per_tok=0), r"experts_per_token is 0, must be in \[1, num_experts = 128\]: a token goes through some"),
        (dict(num_experts_per_tok=129), r"experts_per_token is 129, must be in \[1, num_experts = 128\]"),
        (dict(num_experts=-1), r"num_experts is -1, must be a whole number in \[0, "),
        (dict(norm_topk_prob=1), "norm_topk_prob is 1, must be of type bool"),
        (dict(moe_intermediate_size=None), "moe_intermediate_size is missing"),
        (dict(use_sliding_window=True), "sliding_window is missing"),
    ],
)
def test_what_qwen_3_moe_does_not_have_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        hugging_face.to_model_config({**QWEN_3_30B_A3B, **changes})


def test_experts_under_the_name_of_transformers_5_and_windows_in_every_layer():
    renamed = {name.replace("num_experts", "num_local_experts") if name == "num_experts" else name: x for name, x in QWEN_3_30B_A3B.items()}
    assert hugging_face.to_model_config(renamed) == hugging_face.to_model_config(QWEN_3_30B_A3B)
    assert hugging_face.to_model_config({**renamed, "use_sliding_window": True, "sliding_window": 9}).windows == (9,) * 48


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(layer_types=["chunked_attention"] * 26), "layer_types hold chunked_attention"),
        (dict(layer_types=["full_attention", "sliding_attention"]), r"must be one for each of 26 layers"),
        (dict(sliding_window=None), "sliding_window is missing"),
        (dict(use_bidirectional_attention=True), "use_bidirectional_attention is True"),
        (dict(final_logit_softcapping=30.0), "final_logit_softcapping is 30.0"),
    ],
)
def test_what_gemma_3_does_not_have_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        hugging_face.to_model_config({**GEMMA_3_1B, **changes})


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_configurations_are_written_as_their_authors_wrote_them(name):
    """Every key that is written is theirs, or in transformers at the same value where they left it out."""
    published = {"rope_scaling": None, **globals()[name]}
    written = hugging_face.from_model_config(hugging_face.to_model_config(published))
    assert hugging_face.to_model_config(json.loads(json.dumps(written))) == hugging_face.to_model_config(published)
    left_out = {
        "head_dim": 128 if name == "QWQ_32B" else 64, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh", "use_sliding_window": True,
        "layer_types": written.get("layer_types"),
    }  # fmt: skip
    spelled = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"} if name == "GEMMA_2B" else {}
    spelled |= {"intermediate_size": 768} if name == "QWEN_3_30B_A3B" else {}  # theirs is of dense layers, of which there are none
    assert written == {key: spelled.get(key, published.get(key, left_out.get(key))) for key in written}
    assert {"architectures", "model_type", "hidden_size", "rope_theta", "rms_norm_eps"} <= written.keys()


@pytest.mark.parametrize(
    "base, windows",
    [(GEMMA_3_1B, (512, 0) * 13), (GEMMA_2_2B, (0, 4096) * 13), (GEMMA_2_2B, ()), (QWEN_3_1_7B, (0,) * 5 + (7,) * 23), (QWEN_2_5_HALF_B, (9,) * 24)],
)
def test_layers_with_a_window_are_named_one_by_one(base, windows):
    config = dataclasses.replace(hugging_face.to_model_config(base), windows=windows)
    written = hugging_face.from_model_config(config)
    assert written["layer_types"] == ["sliding_attention" if window else "full_attention" for window in windows or (0,) * 26]
    assert written.get("sliding_window", 0) == max(windows, default=0) and hugging_face.to_model_config(written) == config


@pytest.mark.parametrize(
    "base, changes, message",
    [
        (LLAMA_3_2_1B, dict(windows=(4,) + (0,) * 15), r"LlamaForCausalLM, the nearest architecture, can not have windows \(4, 0, .* \(it has \(\)\)"),
        (LLAMA_3_2_1B, dict(logit_soft_cap=30.0, norm_offset=1.0), r"can not have norm_offset 1.0 \(it has 0.0\), logit_soft_cap 30.0 \(it has 0.0\)"),
        (LLAMA_3_2_1B, dict(activation="gelu_tanh"), "GemmaForCausalLM, .*can not have norm_offset 0.0"),
        (LLAMA_3_2_1B, dict(qkv_bias=True, qk_norm=True), "no architecture has activation 'silu', qkv_bias True, qk_norm True, post_norms False and 0 experts together"),
        (QWEN_3_1_7B, dict(windows=(4, 5) + (0,) * 26), r"can not have windows \(4, 5, 0"),
        (GEMMA_2_2B, dict(query_scalar=None), r"can not have query_scalar None \(it has 256.0\)"),
        (GEMMA_3_1B, dict(logit_soft_cap=30.0), "final_logit_softcapping is 30.0"),
        (GEMMA_3_1B, dict(local_rope_theta=None), "can not have local_rope_theta None"),
    ],
)
def test_a_model_that_no_architecture_describes_is_not_written(base, changes, message):
    config = dataclasses.replace(hugging_face.to_model_config(base), **changes)
    with pytest.raises(ValueError, match=message):
        hugging_face.from_model_config(config)


@pytest.mark.parametrize("text, message", [("", "Expecting value"), ("[]", "architectures is None"), ("[" * 100000, "recursion")])
def test_damaged_files_are_refused(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        hugging_face.read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_3_2_1B, "filling": "x" * 2**20}))
    with pytest.raises(ValueError, match="bytes, at most 1048576"):
        hugging_face.read_config(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no config.json in"):
        hugging_face.read_config(tmp_path)
