"""The benchmark's own parts: what is refused, that a ceiling does the matmuls it stands for, and how peers take turns."""

import sys

import jax
import jax.numpy as jnp
import program
import pytest

from launch.benchmarks import ceilings, peers
from launch.benchmarks.work import Job
from pgrpo_jax.models.families import ModelConfig

CONFIG = ModelConfig(
    num_layers=3, width=64, mlp_width=128, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=512, context_length=64, rope_theta=1e4,
    norm_epsilon=1e-5, tied_embeddings=True,
)  # fmt: skip
MATRICES = 3 * (64 * (4 + 4) * 16 + 64 * 64 + 64 * 256 + 128 * 64)
HEAD = 64 * 512


def flops(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def test_the_matmuls_of_a_ceiling_are_the_models():
    """Two operations for a weight and a token, the head included; what is not a matmul adds at most a tenth here."""
    weights, x = ceilings._weights(CONFIG), jnp.ones((32, 64))
    rows = jnp.arange(8, 32)
    forward = 2 * (32 * MATRICES + 24 * HEAD)
    assert 1 <= flops(lambda w, x: ceilings._forward(CONFIG, w, x, rows), weights, x) / forward < 1.1
    backward = flops(lambda w, x: ceilings._gradient(CONFIG, w, x, rows), weights, x) / forward
    first = 2 * 32 * 64 * (4 + 4) * 16 / forward  # the first layer's input has a gradient that nobody needs
    assert 1 <= backward / (3 - first) < 1.06


@pytest.mark.parametrize("job", [Job(num_prompts=2, completions_per_prompt=2, prompt_tokens=4, new_tokens=4)])
def test_ceilings_run(job):
    ceilings.decode(CONFIG, job)()
    ceilings.learn(CONFIG, job, slices=2)()


def test_an_unknown_peer_is_refused():
    done = program.run([sys.executable, str(program.ROOT / "launch" / "benchmark.py"), "update", "--against=vllm"], cwd=program.ROOT)
    assert done.returncode == 2 and "--against=vllm: update knows trl" in done.stderr


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """A driver that answers with the seed twice over and ends at seed 9, in this environment."""
    (tmp_path / "small_driver.py").write_text(
        "import protocol, sys\n"
        "for seed in protocol.rounds():\n"
        "    print('noise of a library')\n"
        "    if seed == 9: sys.exit('out of memory')\n"
        "    if seed == 8: import time; time.sleep(600)\n"
        "    protocol.answer(generation_tokens_per_sec=2.0 * seed)\n"
    )
    (tmp_path / "protocol.py").write_text((program.ROOT / "launch" / "peers" / "protocol.py").read_text())
    environment = tmp_path / "environment"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setattr(peers, "_DRIVERS", tmp_path)
    monkeypatch.setattr(peers, "_installed", lambda name: environment)
    return environment


def test_peers_take_turns_and_say_why_they_ended(driver):
    with peers.started(["small"]) as others:
        peer = others["small"]
        assert [peer.round(seed)["generation_tokens_per_sec"] for seed in (3, 5)] == [6.0, 10.0] and peer.peak_gib > 0.001
        with pytest.raises(peers.PeerError, match=f"small ended with status 1: read {driver / 'log.txt'}"):
            peer.round(9)
    assert "noise of a library" in (driver / "log.txt").read_text() and "out of memory" in (driver / "log.txt").read_text()


def test_a_peer_that_does_not_answer_is_given_up(driver, monkeypatch):
    monkeypatch.setattr(peers, "ROUND_SECS", 0.3)
    with peers.started(["small"]) as others, pytest.raises(peers.PeerError, match="small has not finished round 8 within 0.3 s: read"):
        others["small"].round(8)


def test_a_driver_ends_with_the_benchmark(driver):
    with peers.started(["small"]) as others:
        process = others["small"]._process
    assert process.poll() is not None
