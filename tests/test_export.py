"""A run's policy as a Hugging Face directory: tensors against a mapping written by hand, the way back to the bit, and a place that is never half full."""

import dataclasses
import json
import types

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import small_config
from stops import StopAt

from pgrpo_jax import assembly, export, policies
from pgrpo_jax.models import hugging_face, tokenizer, weights
from pgrpo_jax.models.gguf_tokenizer import byte_level_bpe
from pgrpo_jax.models.gguf_vocabulary import CONTROL, NORMAL, Vocabulary
from pgrpo_jax.preemption import EXIT_PREEMPTED, Stop
from pgrpo_jax.train import train
from tests.models.test_hugging_face_tokenizer import write as write_tokenizer
from tests.models.test_weights import TINY, TOKENS, tiny_tensors, write_tiny

D, F, H, KV, DH, L = 16, 24, 4, 2, 6, 2
QWEN_3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": D, "intermediate_size": F, "num_hidden_layers": L, "num_attention_heads": H,
    "num_key_value_heads": KV, "head_dim": DH, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "dtype": "bfloat16",
    "rope_theta": 1000.0, "unknown_key": {"kept": True},
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Hugging Face directory: a random Qwen 3 in bfloat16, with a small tokenizer of its own."""
    directory = tmp_path_factory.mktemp("model")
    named = {"tokenizer_class": "PreTrainedTokenizerFast"}  # or transformers would cut texts as Qwen's own tokenizer does
    generation = {"eos_token_id": [5], "temperature": 0.1, "repetition_penalty": 2.0}
    vocab = write_tokenizer(directory, config=QWEN_3, named=named, generation=generation).get_vocab_size() + 7
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (vocab, D), "lm_head.weight": (vocab, D), "model.norm.weight": (D,)}
    for layer in range(L):
        of = {"input_layernorm": (D,), "post_attention_layernorm": (D,), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
        of |= {"self_attn.q_proj": (H * DH, D), "self_attn.k_proj": (KV * DH, D), "self_attn.v_proj": (KV * DH, D), "self_attn.o_proj": (D, H * DH)}
        of |= {"self_attn.q_norm": (DH,), "self_attn.k_norm": (DH,)}
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in of.items()}
    tensors = {name: (0.2 * rng.standard_normal(shape) + ("norm" in name)).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()}
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return directory


def changes_of(directory):
    return {"num_steps": 2, "model__path": str(directory), "generation__temperature": 0.75, "generation__top_k": 9, "generation__prompt_buckets": (64,)}


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """(its configuration, its identity, its directory): two updates of that model."""
    workdir, changes = tmp_path_factory.mktemp("trained") / "run", changes_of(model)
    config, identity = small_config.config(**changes), small_config.identity(**changes)
    assert train(config, identity=identity, workdir=workdir, stop=Stop()) == 0
    return config, identity, workdir


def exported(run, output, **options):
    config, identity, workdir = run
    return export.export(config, identity=identity, workdir=workdir, output=str(output), **{"stop": Stop(), **options})


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    output = tmp_path_factory.mktemp("exported") / "deep" / "model"
    assert exported(run, output) == 0
    return output


def by_hand(params):
    """Parameters as transformers names and shapes them."""
    layers, matrix = params["layers"], {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
    found = {"model.embed_tokens.weight": params["embedding"], "model.norm.weight": params["final_norm"], "lm_head.weight": params["head"].T}
    for n in range(L):
        of = {name: layers[ours][n].T for ours, name in matrix.items()}
        of |= {f"self_attn.{name[0]}_proj": layers[name][n].reshape(D, -1).T for name in ("query", "key", "value")}
        of |= {"self_attn.o_proj": layers["output"][n].reshape(-1, D).T, "self_attn.q_norm": layers["query_norm"][n], "self_attn.k_norm": layers["key_norm"][n]}
        of |= {"input_layernorm": layers["attention_norm"][n], "post_attention_layernorm": layers["mlp_norm"][n]}
        found |= {f"model.layers.{n}.{name}.weight": np.ascontiguousarray(tensor) for name, tensor in of.items()}
    return {name: np.asarray(tensor) for name, tensor in found.items()}


def values(directory, name):
    return json.loads((directory / name).read_text())


def trained(run):
    config, identity, workdir = run
    return jax.device_get(policies.restore(config, identity=identity, run=workdir).learner.state.trainable)


def test_the_tensors_are_those_of_the_checkpoint(run, model, made):
    expected, found = by_hand(trained(run)), safetensors.numpy.load_file(made / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, strict=True)
    before = safetensors.numpy.load_file(model / "model.safetensors")
    changed = [name for name, tensor in before.items() if (tensor.astype(np.float32) != found[name]).any()]
    assert len(changed) == len(before)  # two updates have moved all of them: it is not the base model that is written


def test_the_files_are_those_of_the_base_model_and_of_the_run(run, model, made):
    copied = {"tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in made.iterdir()} == copied | {"config.json", "generation_config.json", "model.safetensors"}
    assert all((made / name).read_bytes() == (model / name).read_bytes() for name in copied)
    assert values(made, "config.json") == values(model, "config.json") | {"dtype": "float32"}
    given = tokenizer.load(model)
    assert len(given.stop_ids) == 3 and given.bos_id is None
    assert values(made, "generation_config.json") == {
        "eos_token_id": list(given.stop_ids), "pad_token_id": given.pad_id, "do_sample": True, "temperature": 0.75, "top_k": 9, "top_p": 1.0,
    }  # fmt: skip
    assert {oct(file.stat().st_mode & 0o777) for file in made.iterdir()} == {oct((made / "config.json").stat().st_mode & 0o777)}


def test_the_way_back(run, made, tmp_path):
    """The directory is a base model: the same parameters, to the bit, the same tokens and ends; and a run begins there."""
    changes = changes_of(made)
    config = small_config.config(**changes)
    task = assembly.load_task(config)
    base, before = assembly.load_base(config, task), assembly.load_base(run[0], task)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), base.trainable(), trained(run))
    assert base.model.config == before.model.config and base.tokenizer.stop_ids == before.tokenizer.stop_ids
    for prompt in task.prompts("test", 0, 5):
        assert base.tokenizer.render_chat(prompt.text) == before.tokenizer.render_chat(prompt.text)
    assert train(config, identity=small_config.identity(**changes), workdir=tmp_path / "next", stop=Stop()) == 0
    again = (config, small_config.identity(**changes), tmp_path / "next")
    assert exported(again, tmp_path / "again") == 0
    assert values(tmp_path / "again", "config.json") == values(made, "config.json")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_smaller_types_are_the_nearest_numbers(run, made, dtype, tmp_path):
    assert exported(run, tmp_path / "model", dtype=dtype) == 0
    whole, rounded = (safetensors.numpy.load_file(each / "model.safetensors") for each in (made, tmp_path / "model"))
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    for name, tensor in whole.items():
        np.testing.assert_array_equal(rounded[name], tensor.astype(kind), strict=True)
    assert values(tmp_path / "model", "config.json")["dtype"] == dtype
    assert weights.load(tmp_path / "model")[0] == weights.load(made)[0]


def of_model(path, model_config, given, config=None):
    """What `export.write` reads of a run."""
    base = types.SimpleNamespace(model=types.SimpleNamespace(config=model_config), tokenizer=given)
    return types.SimpleNamespace(config=config or small_config.config(model__path=path), base=base)


def test_of_a_random_model_and_back(tmp_path):
    """Bytes for tokens: the vocabulary is written too, so that a run can begin there."""
    config = small_config.config(generation__prompt_buckets=(64,))
    task = assembly.load_task(config)
    base = assembly.load_base(config, task)
    export.write(tmp_path, of_model("", base.model.config, base.tokenizer, config), jax.device_get(base.trainable()), dtype="float32")
    back = assembly.load_base(small_config.config(model__path=str(tmp_path), generation__prompt_buckets=(64,)), task)
    assert back.model.config == base.model.config
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), back.trainable(), jax.device_get(base.trainable()))
    for name in ("vocab_size", "bos_id", "eos_id", "pad_id", "stop_ids"):
        assert getattr(back.tokenizer, name) == getattr(base.tokenizer, name)
    for prompt in task.prompts("test", 0, 5):
        assert back.tokenizer.render_chat(prompt.text) == base.tokenizer.render_chat(prompt.text)


@pytest.mark.parametrize("tied", [True, False])
def test_of_a_gguf_file_and_back(tied, tmp_path):
    sizes = TINY | {"tied_embeddings": tied}
    write_tiny(tmp_path / "tiny.gguf", tiny_tensors(sizes), sizes)
    config, params = weights.load(tmp_path / "tiny.gguf")
    given, output = tokenizer.load(tmp_path / "tiny.gguf"), tmp_path / "out"
    output.mkdir()
    export.write(output, of_model(str(tmp_path / "tiny.gguf"), config, given), params, dtype="float32")
    found, back = weights.load(output)
    assert found == config and hugging_face.read_config(output) == config
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), back, params)
    assert tokenizer.load(output).render_chat("ab") == given.render_chat("ab")
    assert values(output, "tokenizer.json")["model"]["vocab"] == {text: id_ for id_, text in enumerate(TOKENS)}


def test_a_model_that_no_architecture_describes_is_refused_by_name(tmp_path):
    write_tiny(tmp_path / "tiny.gguf", tiny_tensors(TINY), TINY)
    config, params = weights.load(tmp_path / "tiny.gguf")
    vocabulary = Vocabulary(TOKENS, [CONTROL if token in (4, 5) else NORMAL for token in range(len(TOKENS))], {"eos": 4})
    given = byte_level_bpe(vocabulary, merges=[("a", "b")], pre_tokenizer="smollm", chat_template="<s>{{ messages[0].content }}")
    with pytest.raises(ValueError, match=r"LlamaForCausalLM, the nearest architecture, can not have logit_soft_cap 5.0 \(it has 0.0\)"):
        export.write(tmp_path, of_model("", dataclasses.replace(config, logit_soft_cap=5.0), given), params, dtype="float32")


def unread(*arguments, **options):
    raise AssertionError("the run was read before the output was looked at")


def test_an_output_that_is_there_is_refused_before_any_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(policies, "restore", unread)
    full, file, link = tmp_path / "full", tmp_path / "file", tmp_path / "link"
    full.mkdir(), (full / "kept").touch(), file.touch(), link.symlink_to(tmp_path / "nowhere")
    for output in (full, file, link):
        with pytest.raises(FileExistsError, match=f"--output {output} is there already: give a new directory, or delete it"):
            exported(run, output)
    with pytest.raises(ValueError, match="--output gs://bucket/x is in a bucket: give a local directory"):
        exported(run, "gs://bucket/x")
    with pytest.raises(PermissionError, match=f"nothing can be made in {file}: give another place"):
        exported(run, file / "below")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "kept", "link"]


def test_an_empty_directory_is_filled(run, made, tmp_path):
    (tmp_path / "model").mkdir()
    assert exported(run, tmp_path / "model") == 0
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()


def test_no_checkpoint(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="no committed checkpoint in .*nowhere/checkpoints: give the --workdir of a run that has saved one"):
        exported((run[0], run[1], tmp_path / "nowhere"), tmp_path / "out" / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [1, 2])
def test_a_stop_leaves_nothing(count, run, tmp_path, capsys):
    assert exported(run, tmp_path / "model", stop=StopAt(count)) == EXIT_PREEMPTED
    assert "nothing is written; run the same command again" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_nothing_and_a_place_that_was_taken_meanwhile_stays(run, tmp_path, monkeypatch):
    sync, calls = export._sync, []

    def meanwhile(directory, **options):
        calls.append(directory)
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "theirs").write_text("kept")
        sync(directory, **options)

    with monkeypatch.context() as patched:
        patched.setattr(export, "_sync", meanwhile)
        with pytest.raises(OSError, match="not empty"):
            exported(run, tmp_path / "model")
    assert len(calls) == 1 and calls[0].parent.parent == tmp_path  # beside its place, so that the rename is one step
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["model", "model/theirs"]


def test_a_tensor_that_does_not_fit_leaves_nothing(run, tmp_path, monkeypatch):
    huge = jax.tree.map(np.array, trained(run))
    huge["final_norm"][3] = 1e6
    monkeypatch.setattr(policies, "policy_of", lambda learner: huge)
    with pytest.raises(ValueError, match="'model.norm.weight' reaches to 1e\\+06, the largest finite float16 is 65504"):
        exported(run, tmp_path / "model", dtype="float16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parity
def test_transformers_reads_it_and_computes_the_same(made):
    """Logits of held-out prompts as it tokenises them itself, and greedy answers."""
    import torch
    import transformers

    from pgrpo_jax.generation import engine
    from pgrpo_jax.generation.sampler import Support
    from pgrpo_jax.models import transformer

    theirs = transformers.AutoModelForCausalLM.from_pretrained(made, attn_implementation="eager").eval()
    assert theirs.dtype == torch.float32
    their_tokenizer, given = transformers.AutoTokenizer.from_pretrained(made), tokenizer.load(made)
    config, params = weights.load(made)
    model = transformer.Transformer(config)
    for text in ("user 512 likes: z z v", "user 3 likes: a e q"):
        ids = given.render_chat(text)
        chat = [{"role": "user", "content": text}]
        assert their_tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"] == ids
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits.numpy()
        tokens = np.array([ids], np.int32)
        hidden, _ = transformer.forward(model, params, tokens, np.arange(len(ids), dtype=np.int32)[None])
        assert expected.std() > 0.1 and np.abs(np.asarray(transformer.logits(params, hidden, 0.0)) - expected).max() <= 1e-4
        wanted = engine.GenerationSettings(max_new_tokens=12, support=Support(top_k=1), stop_ids=given.stop_ids, pad_id=given.pad_id, prompt_buckets=(64,))
        padded, lengths = engine.pad_prompts([ids], buckets=(64,), pad_id=given.pad_id)
        found = engine.generate(model, params, padded, lengths, jax.random.key(0), completions_per_prompt=1, settings=wanted)
        answer = theirs.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=12, do_sample=False)
        assert found.tokens[0, : found.lengths[0]].tolist() == answer[0, len(ids) :].tolist()
